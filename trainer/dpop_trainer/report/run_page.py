"""The page of a run, run.html: what became of the answers large, everything else small; drawn anew while it goes on."""

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from dpop_trainer.report import html_page
from dpop_trainer.report.charts import LARGE, SMALL, Line, Size, lines
from dpop_trainer.report.palette import CHOSEN, PLAIN, REJECTED, Style
from dpop_trainer.report.scale import Axis
from dpop_trainer.report.signed import signed
from dpop_trainer.report.svg import Panel
from dpop_trainer.run_folder.private import shareable
from dpop_trainer.run_folder.run_files import METRICS_FILE, read_metrics
from dpop_trainer.settings.wording import counted

logger = logging.getLogger(__name__)

PAGE_FILE = "run.html"

CHOSEN_CHANGE, REJECTED_CHANGE = "dpop/chosen_logratio", "dpop/rejected_logratio"

_MOST_POINTS = 500
_FAR = 20
"""Times its median, a largest value that asks for a logarithmic axis: beside one spike all others are a flat line."""
# seconds between two pages, and how many times as long as a page takes: at most two percent of a run go into them
_INTERVAL, _SHARE = 30.0, 50.0


class _Series(NamedTuple):
    key: str
    """Of metrics.jsonl; the same with `eval_` before it is drawn as points."""
    name: str
    style: Style = PLAIN


class _Chart(NamedTuple):
    title: str
    unit: str
    series: tuple[_Series, ...]
    zero: bool = False
    """Draw a line at 0, below which something is lost."""
    log: bool = False
    from_zero: bool = False
    unless: str = ""
    """A key of metrics.jsonl under which another chart shows the same."""


_LARGE = (
    _Chart(
        "Change of the answers",
        "log π − log π_ref, nats per answer",
        (
            _Series(CHOSEN_CHANGE, "chosen", CHOSEN),
            _Series(REJECTED_CHANGE, "rejected", REJECTED),
        ),
        zero=True,
    ),
    _Chart("Margin", "β · (Δ chosen − Δ rejected)", (_Series("rewards/margins", "training"),), zero=True),
)
_SMALL = (
    _Chart("Loss", "", (_Series("loss", "training"),)),
    _Chart("Penalty", "β λ max(0, −Δ chosen)", (_Series("dpop/penalty", "training"),)),
    _Chart(
        "Shares of pairs",
        "",
        (
            _Series("rewards/accuracies", "margin > 0"),
            _Series("dpop/active_fraction", "penalty active", Style("soft", "7 3", "square")),
        ),
    ),
    _Chart(
        "Log-probs of the answers",
        "nats per answer",
        (_Series("logps/chosen", "chosen", CHOSEN), _Series("logps/rejected", "rejected", REJECTED)),
    ),
    _Chart(
        "Rewards",
        "β · Δ",
        (_Series("rewards/chosen", "chosen", CHOSEN), _Series("rewards/rejected", "rejected", REJECTED)),
        zero=True,
        unless=CHOSEN_CHANGE,
    ),
    _Chart("Gradient norm", "before clipping", (_Series("grad_norm", "training"),), log=True),
    _Chart("Learning rate", "", (_Series("learning_rate", "learning rate"),)),
    _Chart("Speed", "tokens per second, all processes", (_Series("tokens/per_second", "speed"),), from_zero=True),
    _Chart("Peak memory", "GiB, largest process", (_Series("memory/peak_gib", "peak memory"),), from_zero=True),
    _Chart("Token accuracy", "share of chosen tokens", (_Series("mean_token_accuracy", "training"),)),
)
_TELLING = {series.key for chart in (*_LARGE, *_SMALL) for series in chart.series} - {"loss"}
"""Keys that an evaluation is known by: of "eval_aux_loss" nobody knows whether it is one."""


class RunPage(TrainerCallback):
    """Draws a run's page now and then, and at its end. One that cannot be drawn or written does not end the run: it is
    told once.

    Args:
        run_config: the run's configuration: what the page is named by. No path of the machine gets into the page.
    """

    def __init__(self, run_config: Mapping[str, Any]) -> None:
        self._run_config = shareable(run_config)
        self._next = 0.0
        self._has_failed = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._next = time.monotonic() + _INTERVAL

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() >= self._next:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        start, folder = time.monotonic(), Path(args.output_dir)
        try:
            write_run_page(read_metrics(folder), self._run_config, folder)
        except Exception as error:  # a picture is never worth a run
            if not self._has_failed:
                told = f"{type(error).__name__}: {error}"
                logger.warning("%s: not drawn (%s). The run goes on.", folder / PAGE_FILE, told)
            self._has_failed = True
        now = time.monotonic()
        self._next = now + max(_INTERVAL, _SHARE * (now - start))


def write_run_page(metrics: Sequence[Mapping[str, Any]], run_config: Mapping[str, Any], folder: Path) -> None:
    """
    Args:
        metrics: the lines of metrics.jsonl.
        run_config: what the page names the run and its data by.
        folder: of the run.
    """
    large, small = large_panels(metrics), _panels(_SMALL, metrics, SMALL)
    settings = {key: value for key, value in run_config.items() if key in _TOLD and value not in (None, [], {})}
    outcome = _outcome(metrics)
    sections = [
        html_page.tiles(_tiles(outcome)) if outcome.values else "",
        html_page.charts(large, large=True) if large else "",
        html_page.paragraph("Over optimizer steps; hollow points are evaluations on held-out pairs.", "note"),
        html_page.charts(small) if small else "",
        html_page.folded("Main settings (all: config.yaml)", html_page.facts(settings)),
        html_page.paragraph(f"Every number: {METRICS_FILE}.", "note"),
    ]
    about = " · ".join(part for part in (folder.name, *_named(run_config)) if part)
    html_page.write_page(
        _headline(outcome), [part for part in sections if part], folder / PAGE_FILE, about=about, kind=_kind(outcome)
    )


def large_panels(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The change of the answers, and the margin."""
    return _panels(_LARGE, metrics, LARGE)


_TOLD = (
    "model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
    "loss_type",
    "beta",
    "dpop_lambda",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "use_peft",
    "lora_r",
    "seed",
)


def _named(run_config: Mapping[str, Any]) -> list[str]:
    """The loss, the model and the data."""
    losses = run_config.get("loss_type") or ""
    losses = " + ".join(losses) if isinstance(losses, list | tuple) else str(losses)
    model, data = (str(run_config.get(key) or "") for key in ("model_name_or_path", "dataset_name"))
    return [losses.upper(), model, f"on {data}" if data else ""]


class _Outcome(NamedTuple):
    """What was last measured of the answers."""

    step: int
    pairs: str
    values: dict[str, float]
    """By key of metrics.jsonl; empty where the run has no reference to measure against."""
    loss: float | None


def _outcome(metrics: Sequence[Mapping[str, Any]]) -> _Outcome:
    """On held-out pairs where there are any, else on the last that were trained on."""
    loss = _latest(metrics, "loss")
    for prefix in (*_evaluations(metrics), ""):
        change = _latest(metrics, prefix + CHOSEN_CHANGE)
        if change:
            keys = (CHOSEN_CHANGE, REJECTED_CHANGE, "rewards/accuracies", "rewards/margins")
            latest = {key: _latest(metrics, prefix + key) for key in keys}
            values = {key: value[1] for key, value in latest.items() if value}
            return _Outcome(change[0], _pairs(prefix), values, loss and loss[1])
    return _Outcome(max((line["step"] for line in metrics), default=0), "", {}, loss and loss[1])


def _headline(outcome: _Outcome) -> str:
    """Where the run stands, and what became of the chosen answers by then."""
    if outcome.values:
        change = outcome.values[CHOSEN_CHANGE]
        moved = {"good": "gained", "bad": "lost"}.get(_kind(outcome))
        told = f"{moved} {abs(change):.2f} nats each" if moved else "are where they were"
        return f"After {counted(outcome.step, 'step')} the chosen answers {told}, on {outcome.pairs} pairs"
    told = "" if outcome.loss is None else f": loss {outcome.loss:.4g}"
    return f"After {counted(outcome.step, 'step')}{told}"


def _kind(outcome: _Outcome) -> str:
    change = round(outcome.values.get(CHOSEN_CHANGE, 0.0), 2)
    return "bad" if change < 0 else "good" if change > 0 else ""


def _tiles(outcome: _Outcome) -> list[tuple[str, str]]:
    told = {
        CHOSEN_CHANGE: (lambda value: f"{signed(value)} nats", "the chosen answers' log-prob, a mean per answer"),
        REJECTED_CHANGE: (lambda value: f"{signed(value)} nats", "the rejected answers'"),
        "rewards/accuracies": ("{:.1%}".format, "of the pairs: the chosen answer gained more (reward accuracy)"),
        "rewards/margins": (signed, "margin, β · (Δ chosen − Δ rejected)"),
    }
    return [(text(outcome.values[key]), what) for key, (text, what) in told.items() if key in outcome.values]


def _evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the keys of evaluations begin with: "eval_", or "eval_NAME_" for each of several sets."""
    keys = {key for line in metrics for key in line if key.startswith("eval_")}
    found = {key.removesuffix(known) for key in keys for known in _TELLING if key.endswith(known)}
    return sorted(found | {"eval_"} if "eval_loss" in keys else found)


def _pairs(prefix: str) -> str:
    return " ".join(["held-out", prefix.removeprefix("eval_").rstrip("_")]).strip() if prefix else "training"


def _latest(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[int, float] | None:
    return next(iter(_points(metrics, key)[-1:]), None)


def _panels(charts: Sequence[_Chart], metrics: Sequence[Mapping[str, Any]], size: Size) -> list[Panel]:
    """Of those of which the run has logged anything that no other one shows."""
    drawn = ((chart, _lines(chart, metrics)) for chart in charts if not _latest(metrics, chart.unless))
    return [
        Panel(chart.title.lower().replace(" ", "_"), _drawn(chart, series, size)) for chart, series in drawn if series
    ]


def _lines(chart: _Chart, metrics: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The series in training, then in evaluations; of a single one the name says only which."""
    found = []
    for one in chart.series:
        for prefix in ("", *_evaluations(metrics)):
            points = _points(metrics, prefix + one.key)
            if points:
                told = [one.name] if len(chart.series) > 1 else []
                name = ", ".join([*told, _pairs(prefix)] if prefix or not told else told)
                x, y = zip(*points, strict=True)
                found.append(Line(name, x, y, one.style, kind="points" if prefix else "line"))
    return found


def _drawn(chart: _Chart, series: Sequence[Line], size: Size) -> str:
    values = [value for line in series for value in line.y]
    is_far = max(values) > _FAR * statistics.median(values) and not chart.zero and not chart.from_zero
    y = Axis(chart.unit, log=(chart.log or is_far) and min(values) > 0)
    if chart.from_zero:
        y = y._replace(low=0.0, high=1.15 * max(values) or 1.0)
    return lines(chart.title, series, Axis("step", whole=True), y, size=size, zero=chart.zero)


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that hold a finite number under the key; evenly thinned where there are many."""
    points = [
        (line["step"], float(line[key]))
        for line in metrics
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    stride = math.ceil(len(points) / _MOST_POINTS) or 1
    return points[::-1][::stride][::-1]
