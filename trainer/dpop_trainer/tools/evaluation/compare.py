"""Models side by side: differences to the first one with their standard errors, as Markdown and as plain values.

    difference = mean over questions of (after - before)        standard error: of that mean, paired by question

Two models answer the same questions, most of them alike. The paired error leaves out how hard the questions are, and
is often half of what the two models' own errors suggest.

Source: Miller 2024, arXiv:2411.00640 (paired analysis of two models on the same questions).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dpop_trainer.report.markdown import plain, table
from dpop_trainer.report.signed import minus, signed
from dpop_trainer.report.terminal import PLAIN, Terminal
from dpop_trainer.tools.evaluation.held_out import TASK as PAIRS
from dpop_trainer.tools.evaluation.held_out import compare_with_reference
from dpop_trainer.tools.evaluation.records import Metric, TaskResult
from dpop_trainer.tools.evaluation.tasks import LEADERBOARD

# these are shown as they are, in nats per answer; everything else is a share, shown in percent
IN_NATS = ("chosen_logps", "rejected_logps", "chosen Δ", "rejected Δ")

# nats; two ways of computing the same model's answer differ by less
ROUNDING = 0.01


class Difference(NamedTuple):
    """One model's figure less the first model's."""

    value: float
    stderr: float | None
    paired: bool
    """Whether the error is of per-question differences, rather than of two independent figures."""


def difference(after: Metric, before: Metric) -> Difference:
    """Paired by question where both have every question's figure, else of two independent figures."""
    ours, theirs = after.by_question, before.by_question
    if ours is not None and theirs is not None and ours.keys() == theirs.keys():
        changes = np.array([ours[question] - theirs[question] for question in ours])
        stderr = float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else None
        return Difference(float(changes.mean()), stderr, True)
    stderr = None
    if after.stderr is not None and before.stderr is not None:
        stderr = math.hypot(after.stderr, before.stderr)
    return Difference(after.value - before.value, stderr, False)


def compare(results: dict[str, dict[str, TaskResult]]) -> dict[str, Any]:
    """All figures as plain values.

    Args:
        results: by model, by task, of which a model may lack some. The first model is the one that the others are held
            against.

    Returns:
        "rows": one for each task's main metric and each figure of the pairs, then the leaderboard's average where all
        of its tasks were run; "notes": what was dropped, truncated or limited.
    """
    models = list(results)
    rows: list[dict[str, Any]] = []
    remarks: list[str] = []
    for task in dict.fromkeys(task for model in models for task in results[model]):
        ran = [model for model in models if task in results[model]]
        result = results[ran[0]][task]
        rows.append(
            _row(
                task,
                result.main_metric,
                {model: results[model][task].metrics[result.main_metric] for model in ran},
                models[0],
                num_questions=result.num_questions,
                num_fewshot=result.num_fewshot,
            )
        )
        if task == PAIRS and ran[0] == models[0] and len(ran) > 1:
            against = {model: compare_with_reference(results[model][PAIRS], result) for model in ran[1:]}
            rows += _pair_rows(result, {model: metrics for model, metrics in against.items() if metrics is not None})
            remarks += [_remark(model, models[0], metrics) for model, metrics in against.items()]
    whole = [model for model in models if set(LEADERBOARD) <= set(results[model])]
    if models[0] in whole:
        rows.append(_average([row for row in rows if row["task"] in LEADERBOARD], whole))
    notes = [
        f"{model}, {task}: {note}."
        for model in models
        for task, result in results[model].items()
        for note in result.notes
    ]
    notes += [remark for remark in remarks if remark]
    return {"models": models, "rows": rows, "notes": notes}


def as_markdown(comparison: dict[str, Any], title: str = "Evaluation") -> str:
    """The comparison as one table with a line on how to read it."""
    titles, *rows = _table(comparison)
    text = f"# {title}\n\n{table(titles, rows)}\n\n{_legend(comparison, plain)}"
    if comparison["notes"]:
        text += "\n\n" + "\n".join(f"- {plain(note)}" for note in comparison["notes"])
    return text + "\n"


def as_text(comparison: dict[str, Any], terminal: Terminal = PLAIN) -> str:
    """The same for a terminal."""
    titles, *rows = _table(comparison)
    named = [[f"{task}, {metric}", *rest] for task, metric, *rest in rows]
    figures = terminal.table([["task", *titles[2:]], *named])
    notes = [terminal.filled(note, "  ", after="- ") for note in comparison["notes"]]
    return "\n\n".join([figures, terminal.filled(_legend(comparison)), *(["\n".join(notes)] if notes else [])])


def _table(comparison: dict[str, Any]) -> list[list[str]]:
    """Titles, then a row per figure."""
    models = comparison["models"]
    titles = ["task", "metric", "shots", "questions", *models]
    lines = [[*titles, *(f"{model} − {models[0]}" for model in models[1:])]]
    for row in comparison["rows"]:
        cells = [row["task"], row["metric"], _shown(row["num_fewshot"]), _shown(row["num_questions"])]
        cells += [_cell(row["metric"], row["figures"].get(model)) for model in models]
        cells += [_cell(row["metric"], row["differences"].get(model), is_change=True) for model in models[1:]]
        lines.append(cells)
    return lines


def _legend(comparison: dict[str, Any], shown: Callable[[str], str] = str) -> str:
    """How to read the table."""
    models = comparison["models"]
    text = "± is one standard error."
    if len(models) > 1:
        text += " That of a difference is over the questions' own differences: both models answered the same ones."
        text += " A difference below about two of them may be chance."
    if any(not change["paired"] for row in comparison["rows"] for change in row["differences"].values()):
        text += " Where the questions' own figures do not make up a task's, the two errors are added in squares."
    if len(models) > 1 and any(row["task"] == PAIRS for row in comparison["rows"]):
        text += f" Δ is the change of an answer's log-prob against {shown(models[0])}, in nats."
    return text


def _row(task: str, metric: str, metrics: dict[str, Metric], first: str, **facts: Any) -> dict[str, Any]:
    others = [model for model in metrics if model != first] if first in metrics else []
    return {
        "task": task,
        "metric": metric,
        **facts,
        "figures": {model: _figure(figure) for model, figure in metrics.items()},
        "differences": {model: difference(metrics[model], metrics[first])._asdict() for model in others},
    }


def _average(rows: list[dict[str, Any]], models: list[str]) -> dict[str, Any]:
    """The leaderboard's plain mean over its tasks; tasks are independent, so their errors add in squares."""

    def mean(parts: list[dict[str, Any]]) -> dict[str, Any]:
        errors = [part["stderr"] for part in parts]
        known = all(error is not None for error in errors)
        return {
            "value": sum(part["value"] for part in parts) / len(parts),
            "stderr": math.sqrt(sum(error**2 for error in errors)) / len(parts) if known else None,
            **({"paired": all(part["paired"] for part in parts)} if "paired" in parts[0] else {}),
        }

    return {
        "task": "average",
        "metric": "mean of the tasks above" if len(rows) == len(LEADERBOARD) else "mean of the six",
        "num_questions": sum(row["num_questions"] for row in rows),
        "num_fewshot": None,
        "figures": {model: mean([row["figures"][model] for row in rows]) for model in models},
        "differences": {model: mean([row["differences"][model] for row in rows]) for model in models[1:]},
    }


def _pair_rows(first: TaskResult, against: dict[str, dict[str, Metric]]) -> list[dict[str, Any]]:
    """What the pairs say of each model against the first."""
    names = dict.fromkeys(name for metrics in against.values() for name in metrics)
    return [
        {
            "task": PAIRS,
            "metric": name,
            "num_questions": first.num_questions,
            "num_fewshot": None,
            "figures": {model: _figure(metrics[name]) for model, metrics in against.items()},
            "differences": {},
        }
        for name in names
    ]


def _remark(model: str, first: str, metrics: dict[str, Metric] | None) -> str:
    """What a reader of a model's rows on the pairs must know; empty where nothing."""
    if metrics is None:
        return (
            f"{model}, {PAIRS}: kept other pairs than {first} (another tokenizer or length): not held against it. "
            "A larger max_length may help."
        )
    changes = [metrics[name].by_question or {} for name in ("chosen Δ", "rejected Δ")]
    if all(abs(change) < ROUNDING for by_pair in changes for change in by_pair.values()):
        return f"{model}, {PAIRS}: no answer moved by {ROUNDING} nats: reward accuracy is that of rounding."
    return ""


def _figure(metric: Metric) -> dict[str, Any]:
    return {"value": metric.value, "stderr": metric.stderr}


def _cell(metric: str, figure: dict[str, Any] | None, *, is_change: bool = False) -> str:
    if figure is None:
        return "–"
    value, stderr = figure["value"], figure["stderr"]
    in_nats = metric in IN_NATS
    scale = 1.0 if in_nats else 100.0
    told = value * scale
    text = signed(told) if is_change or in_nats else minus(f"{told:.2f}")
    return text if stderr is None else f"{text} ± {stderr * scale:.2f}"


def _shown(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"
