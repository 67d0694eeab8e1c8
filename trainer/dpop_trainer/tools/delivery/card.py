"""A model card from what a run left behind: nothing in it is typed by hand, and what is not known is said to be."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml

from dpop_kernels.losses.options import LossOptions
from dpop_trainer.data.dataset_source import DatasetSource, parse_sources
from dpop_trainer.data.source_path import expanded, looks_local
from dpop_trainer.models.trained import read_run_config, run_file
from dpop_trainer.report.markdown import code, joined, plain, table
from dpop_trainer.report.signed import minus, signed
from dpop_trainer.run_folder.run_files import METRICS_FILE, read_metrics
from dpop_trainer.run_folder.versions import versions

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# settings that say what was trained, in this order; the rest is in config.yaml, which goes with the card
SETTINGS = (
    "loss_type",
    "loss_weights",
    "beta",
    "dpop_lambda",
    "dpop_lambda_warmup_steps",
    "dpop_dead_zone",
    "label_smoothing",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "truncation_mode",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "load_in_4bit",
    "bf16",
    "seed",
)
# shown where they are not the default
_OTHER_OPTIONS = {name: usual for name, usual in LossOptions._field_defaults.items() if name not in SETTINGS}
FIGURES = {
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "dpop/chosen_logratio": "chosen Δ, nats per answer",
    "dpop/rejected_logratio": "rejected Δ, nats per answer",
    "dpop/active_fraction": "share of pairs under the penalty",
}


def model_card(
    run: Path,
    *,
    name: str,
    base: str | None,
    license_id: str | None,
    merge_note: str,
    evaluation: Path | None = None,
    is_chat: bool = False,
) -> str:
    """The text of README.md.

    Args:
        run: the run's folder: config.yaml, metrics.jsonl and inspect.json are read where they are there.
        name: the model's name.
        base: what it was trained from.
        license_id: the hub's id of its licence; None: the base's, where it says one.
        merge_note: how the weights came about.
        evaluation: results.json of `dpop eval`.
        is_chat: its tokenizer has a chat template.
    """
    config = read_run_config(run)
    trained_from = base or config.get("model_name_or_path")
    license_id = license_id or base_license(trained_from)
    datasets = [source.path for source in _sources(config) if _is_hub_id(source.path)]
    front: dict[str, Any] = {
        **({"license": license_id} if license_id else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpop", "preference-fine-tuning", "dpop-kernels"],
        **({"base_model": trained_from} if trained_from and _is_hub_id(trained_from) else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
    }
    sections = [
        f"# {plain(name)}",
        _opening(config, trained_from, merge_note),
        "## Use",
        _use(name, is_chat=is_chat),
        "## Data",
        _data(config, run),
        "## Training",
        _training(config, run),
        "## Evaluation",
        _evaluation(run, evaluation),
        "## Licence",
        _license(license_id, trained_from),
        "## Versions",
        _versions(),
    ]
    return (
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---\n\n" + "\n\n".join(sections) + "\n"
    )


def base_license(base: str | None) -> str | None:
    """The licence in the base's own card: in its folder or in the hub's cache. The hub is not asked."""
    if base is None:
        return None
    card = expanded(base) / "README.md"
    if not card.is_file():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(base, "README.md") if _is_hub_id(base) else None
        if not isinstance(found, str):
            return None
        card = Path(found)
    try:
        text = card.read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, UnicodeError, yaml.YAMLError, RecursionError) as error:
        logger.warning("%s: its licence cannot be read (%s). Name it with --license.", card, error)
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def shown_model(name: str) -> str:
    """A hub id in full, of a local folder its name alone."""
    return name if _is_hub_id(name) else Path(name).name


def _opening(config: dict[str, Any], base: str | None, merge_note: str) -> str:
    losses = config.get("loss_type")
    what = f"preference fine-tuning (loss: {plain(joined(losses))})" if losses else "fine-tuning"
    start = code(shown_model(base)) if base else "a model that the run's records do not name"
    return (
        f"Made from {start} by {what} with dpop-kernels; the loss DPOP is of "
        f"[arXiv:2402.13228](https://arxiv.org/abs/2402.13228).\n\n{merge_note}"
    )


def _use(name: str, *, is_chat: bool) -> str:
    asked, told = (
        ('[{"role": "user", "content": "How many?"}]', '[0]["generated_text"][-1]["content"]')
        if is_chat
        else ('"How many?"', '[0]["generated_text"]')
    )
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'write = pipeline("text-generation", model={json.dumps(name)})\n'
        f"print(write({asked}, max_new_tokens=256){told})\n```"
    )


def _data(config: dict[str, Any], run: Path) -> str:
    lines = [_named("Trained on", _sources(config)) or "The run's records do not name the data."]
    lines += filter(None, [_named("Evaluated in training on", _eval_sources(config))])
    first = next((line for line in _metrics(run) if line.get("step") == 0), {})
    # "train_data/num_pairs": 6 -> "train: num pairs"
    rows = [
        (key.replace("_data/", ": ").replace("_", " "), f"{value:,}")
        for key, value in first.items()
        if "data/" in key and value
    ]
    if rows:
        told = "What tokenising kept, dropped and cut; of all that is not listed there was none:"
        lines.append(f"{told}\n\n{table(('count', 'value'), rows)}")
    return "\n\n".join(lines)


def _sources(config: dict[str, Any]) -> list[DatasetSource]:
    """What a run trained on, as far as its records tell."""
    if config.get("dataset_mixture"):
        return parse_sources(config["dataset_mixture"], "dataset_mixture")
    name, split = config.get("dataset_name"), config.get("dataset_train_split") or "train"
    return [DatasetSource(name, name=config.get("dataset_config"), split=split)] if name else []


def _eval_sources(config: dict[str, Any]) -> list[DatasetSource]:
    if config.get("eval_datasets"):
        return parse_sources(config["eval_datasets"], "eval_datasets")
    split = config.get("dataset_test_split")
    name = config.get("eval_dataset_name") or (config.get("dataset_name") if split else None)
    return [DatasetSource(name, split=split or "train")] if name else []


def _named(what: str, sources: list[DatasetSource]) -> str:
    """A sentence on one source, a list of several, each with what was taken of it; nothing of none."""
    if len(sources) < 2:
        return "".join(f"{what} {_told_source(source)}." for source in sources)
    return "\n".join([f"{what} {len(sources)} data sets:\n", *(f"- {_told_source(source)}" for source in sources)])


def _told_source(source: DatasetSource) -> str:
    details = {
        "configuration": source.name,
        "split": source.split if source.split != "train" else None,
        "revision": source.revision,
        "fraction": source.fraction,
        "weight": source.weight,
        "records": source.num_pairs,
    }
    told = plain(", ".join(f"{name} {value}" for name, value in details.items() if value is not None))
    return _shown_source(source.path) + (f", {told}" if told else "")


def _training(config: dict[str, Any], run: Path) -> str:
    if not config:
        return "No config.yaml was found with the run."
    # of the two that end a run, the one that did
    idle = "num_train_epochs" if (config.get("max_steps") or -1) > 0 else "max_steps"
    names = [*SETTINGS, *(name for name, usual in _OTHER_OPTIONS.items() if config.get(name, usual) != usual)]
    rows = [(name, joined(config[name])) for name in names if config.get(name) is not None and name != idle]
    text = (
        "Every setting is in `training_config.yaml`, which `dpop train --config` takes once local files in it have "
        f"their paths. The main ones:\n\n{table(('setting', 'value'), rows)}"
    )
    lines = _metrics(run)
    logged = [line for line in lines if "loss" in line]
    if logged and not any("eval_loss" in line for line in lines):  # which tells more than the last batch
        first, last = logged[0], logged[-1]
        figures = [
            (label, minus(f"{first[key]:.4g}"), minus(f"{last[key]:.4g}"))
            for key, label in FIGURES.items()
            if isinstance(first.get(key), (int, float)) and isinstance(last.get(key), (int, float))
        ]
        header = ("in training", f"step {first['step']}", f"step {last['step']}")
        text += "\n\n" + table(header, figures)
    return text


def _evaluation(run: Path, evaluation: Path | None) -> str:
    parts = []
    shift = run_file(run, "inspect.json")
    if shift is not None:
        record = json.loads(shift.read_text())
        parts.append(
            f"On {record['num_pairs']:,} preference pairs, against the model before (`dpop inspect`): chosen answers "
            f"{signed(record['chosen_logratio'])} nats, rejected {signed(record['rejected_logratio'])} nats, reward "
            f"accuracy {record['reward_accuracy']:.1%}."
        )
    last = next((line for line in reversed(_metrics(run)) if "eval_loss" in line), None)
    if last is not None:
        figures = [
            (label, minus(f"{last[f'eval_{key}']:.4g}"))
            for key, label in FIGURES.items()
            if isinstance(last.get(f"eval_{key}"), (int, float))
        ]
        parts.append(f"Held-out pairs at step {last['step']}:\n\n" + table(("figure", "value"), figures))
    if evaluation is not None:
        from dpop_trainer.tools.evaluation.compare import as_markdown

        parts.append(as_markdown(json.loads(evaluation.read_text())).partition("\n\n")[2].strip())
    return "\n\n".join(parts) if parts else "No evaluation is among the run's records."


def _license(license_id: str | None, base: str | None) -> str:
    if license_id:
        return f"{code(license_id)}. The base model's terms and those of the data apply as well."
    named = f" {code(shown_model(base))}" if base else ""
    return f"Not stated in the run's records: the terms of the base model{named} apply."


def _versions() -> str:
    return "Exported with " + ", ".join(f"{name} {version}" for name, version in versions().items()) + "."


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run_file(run, METRICS_FILE)
    return [] if path is None else read_metrics(path.parent)


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not looks_local(name) and not Path(name).exists()


def _shown_source(name: str) -> str:
    """A hub id in full; of a local file its name alone, which gives nothing of the machine away."""
    if _is_hub_id(name):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    return f"{code(Path(name).name)} (a local file)"
