"""What every run leaves on disk: config.yaml, metrics.jsonl (one line per log) and metrics.png."""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainingArguments

METRICS_FILE = "metrics.jsonl"


class RunFiles(TrainerCallback):
    """Writes the run's configuration at its start, its metrics as they come, and a plot at every save and at the end.

    Args:
        run_config: written to config.yaml; plain values only.
        data_metrics: what happened to the data; written as step 0 of metrics.jsonl.
    """

    def __init__(self, run_config: dict[str, Any], data_metrics: dict[str, float]) -> None:
        self._run_config, self._data_metrics = run_config, data_metrics

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = _folder(args)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(self._run_config, sort_keys=True, allow_unicode=True))
        # a resumed run continues from its checkpoint: lines after that step are about to be written again
        kept = [line for line in read_metrics(folder) if line["step"] <= state.global_step] if state.global_step else []
        kept = kept or [{"step": 0, **self._data_metrics}]
        (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with (_folder(args) / METRICS_FILE).open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_save(self, args, state, control, **kwargs):
        self._plot(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._plot(args, state)

    def _plot(self, args, state) -> None:
        if state.is_world_process_zero:
            plot_metrics(read_metrics(_folder(args)), _folder(args) / "metrics.png")


def _folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}.") from None
    return metrics


def plot_metrics(metrics: list[dict[str, Any]], path: Path) -> None:
    """Loss, rewards, log-ratios and penalty over optimizer steps, to one PNG."""
    from matplotlib.figure import Figure

    panels = {
        "loss": ["loss", "eval_loss"],
        "rewards (β · log-ratio)": ["rewards/chosen", "rewards/rejected", "rewards/margins"],
        "log-ratio to the reference (nats per answer)": ["dpop/chosen_logratio", "dpop/rejected_logratio"],
        "penalty and active fraction": ["dpop/penalty", "dpop/active_fraction"],
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for key, style in zip(keys, ("-", "--", ":"), strict=False):
            points = [(line["step"], line[key]) for line in metrics if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=key)
        axes.set(title=title, xlabel="optimizer step")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)
