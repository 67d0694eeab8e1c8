"""A comparison on disk: compare.json, its figures, and a page with the verdict, a table with intervals and curves."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from dpop_trainer.report import html_page
from dpop_trainer.report.charts import Estimate, intervals
from dpop_trainer.report.palette import method_styles
from dpop_trainer.report.plots import logratio_panels, token_shift_panels
from dpop_trainer.report.svg import Panel, write_svg
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.tools.compare.report import (
    COLUMNS,
    LEGEND,
    NEUTRAL,
    NEUTRAL_LEGEND,
    RIGHT,
    RIGHT_LEGEND,
    WRITING,
    WRITING_LEGEND,
    Column,
    Comparison,
    RunResult,
    cell,
    curves,
    has_writing,
    held_out,
    interval,
    listed,
    outcomes,
    seeds,
    shown_columns,
    token_shifts,
    verdict,
)

_NAMED = 3
"""Methods that the heading names one by one where one thing is true of all."""


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write compare.json, compare.html and figures/."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "methods": comparison.methods,
        "verdict": verdict(comparison),
        "results": [result.as_dict() for result in comparison.results],
        "config": comparison.config,
        "versions": comparison.versions,
    }
    write_atomically(folder / "compare.json", json.dumps(record, indent=2))
    for panel in (*_outcome_panels(comparison), *_curve_panels(comparison), *_token_panels(comparison)):
        write_svg(panel, folder / "figures")
    config = comparison.config
    sections = [
        html_page.verdict([verdict(comparison)]),
        *result_sections(comparison),
        html_page.heading("How it was made"),
        *setting_sections(comparison),
    ]
    html_page.write_page(
        headline(comparison),
        sections,
        folder / "compare.html",
        about=f"dpop compare · {config['model_name_or_path']} on {config['dataset_name']}",
    )


def headline(comparison: Comparison) -> str:
    """The judgement in a sentence. Where one thing is true of many, how much of it is told instead of who they are."""
    found = {verb: methods for verb, methods in outcomes(comparison).items() if methods}
    if len(found) == 1 and len(comparison.methods) > _NAMED:
        changes = {
            _apart(method): statistics.fmean(map(COLUMNS[0].value, comparison.of(method)))
            for method in comparison.methods
        }
        highest, lowest = (pick(changes, key=changes.__getitem__) for pick in (max, min))
        ends = [f"{COLUMNS[0].text(changes[name])} nats with {name}" for name in (highest, lowest)]
        return f"All {len(changes)} methods {next(iter(found))}: from {ends[0]} to {ends[1]}."
    first, *rest = (f"{listed(list(map(_apart, methods)))} {verb}" for verb, methods in found.items())
    return "; ".join([first, *(part.replace("the chosen answers", "them") for part in rest)]) + "."


def _apart(method: str) -> str:
    """A name that can stand in a list: what varies in brackets."""
    loss, comma, varied = method.partition(", ")
    return f"{loss} ({varied})" if comma else loss


def result_sections(comparison: Comparison) -> list[str]:
    """Chart and table of the outcomes, then the curves, then the tokens."""
    shown = shown_columns(comparison)
    start = comparison.results[0]
    num_seeds = len(comparison.of(comparison.methods[0]))
    what = (
        "two standard errors around the mean over seeds" if num_seeds > 1 else "what the pairs of one seed leave open"
    )
    legends = [text for column, text in ((NEUTRAL, NEUTRAL_LEGEND), (RIGHT, RIGHT_LEGEND)) if column in shown]
    basis = f"On {held_out(start.num_pairs)}, {seeds(num_seeds)} per method. Ranges: {what}. "
    return [
        html_page.heading("Outcome"),
        html_page.charts(_outcome_panels(comparison), large=True),
        _table(comparison, shown),
        html_page.paragraph(basis + LEGEND + "".join(legends), "note"),
        *_writing_sections(comparison),
        html_page.heading("Over training"),
        html_page.paragraph(
            "Log-ratio to the model before, on held-out pairs: mean over seeds, and their range as a band.", "note"
        ),
        html_page.charts(_curve_panels(comparison), large=True),
        html_page.heading("Token by token"),
        html_page.paragraph("Change per token of the chosen answers, mean over seeds.", "note"),
        html_page.charts(_token_panels(comparison), large=True),
    ]


def _writing_sections(comparison: Comparison) -> list[str]:
    if not has_writing(comparison):
        return []
    return [
        html_page.heading("How it writes"),
        _table(comparison, WRITING),
        html_page.paragraph(WRITING_LEGEND, "note"),
    ]


def _table(comparison: Comparison, columns: Sequence[Column]) -> str:
    """The model before, then every method."""
    titles = [("", ""), *((column.title, column.unit) for column in columns)]
    start = comparison.results[0]
    before = ["—" if column.before is None else cell(column, [column.before(start)]) for column in columns]
    rows = [["before training", *before]]
    for method in comparison.methods:
        runs = comparison.of(method)
        rows.append([method, *(_with_interval(column, runs) for column in columns)])
    return html_page.table(titles, rows)


def setting_sections(comparison: Comparison) -> list[str]:
    settings = {key: value for key, value in comparison.config.items() if value not in (None, [], {})}
    return [
        html_page.folded(f"All {len(settings)} settings", html_page.facts(settings)),
        html_page.folded("Versions", html_page.facts(comparison.versions)),
    ]


def _outcome_panels(comparison: Comparison) -> list[Panel]:
    """Both answers' change by method, on the range in which it lies."""
    styles = method_styles(comparison.methods)
    panels = []
    for column, answer in zip(COLUMNS[:2], ("chosen", "rejected"), strict=True):
        rows = []
        for method, style in zip(comparison.methods, styles, strict=True):
            runs = comparison.of(method)
            mean = statistics.fmean(column.value(run) for run in runs)
            low, high = interval(column, runs) or (float("nan"), float("nan"))
            rows.append(Estimate(method, mean, low, high, style, column.text(mean)))
        title = f"{answer.capitalize()} answers against the model before"
        panels.append(Panel(f"{answer}_outcome", intervals(title, rows, "nats per answer")))
    return panels


def _curve_panels(comparison: Comparison) -> list[Panel]:
    return logratio_panels(curves(comparison))


def _token_panels(comparison: Comparison) -> list[Panel]:
    return token_shift_panels(token_shifts(comparison))


def _with_interval(column: Column, runs: Sequence[RunResult]) -> str:
    """The cell, and below it the range."""
    told, found = cell(column, [column.value(run) for run in runs]), interval(column, runs)
    return told if found is None else f"{told}\n{column.text(found.low)} to {column.text(found.high)}"
