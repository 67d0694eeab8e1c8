"""The picture of a run, metrics.png: one panel per question, readable in grey.

Lines differ in style and in how dark they are; evaluations are points.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpop_trainer.run_folder.plot_style import (
    BLUE,
    LABEL,
    LINE_WIDTH,
    SCREEN,
    SMALL,
    VERMILLION,
    ZERO_LINE,
    finish,
    png,
)

_DARK = "0.15"
_MOST_POINTS = 2000

# inches: a panel with its labels, and what they take around the axes
_CELL = (3.3, 2.5)
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.78, 0.12, 0.28, 0.46


class _Line(NamedTuple):
    key: str
    """Of metrics.jsonl; the same with `eval_` before it is drawn as points."""
    label: str
    color: str = BLUE
    style: str = "-"


class _Panel(NamedTuple):
    title: str
    unit: str
    lines: tuple[_Line, ...]
    zero: bool = False
    """Draw a line at 0, below which something is lost."""
    log: bool = False
    from_zero: bool = False


_PANELS = (
    _Panel("Loss", "", (_Line("loss", "training", _DARK),)),
    _Panel(
        "Change of the answers",
        "log π − log π_ref, nats per answer",
        (
            _Line("dpop/chosen_logratio", "chosen Δ", BLUE),
            _Line("dpop/rejected_logratio", "rejected Δ", VERMILLION, "--"),
        ),
        zero=True,
    ),
    _Panel(
        "Log-probs of the answers",
        "nats per answer",
        (_Line("logps/chosen", "chosen", BLUE), _Line("logps/rejected", "rejected", VERMILLION, "--")),
    ),
    _Panel(
        "Rewards",
        "β · Δ",
        (_Line("rewards/chosen", "chosen", BLUE), _Line("rewards/rejected", "rejected", VERMILLION, "--")),
        zero=True,
    ),
    _Panel("Margin", "β · (Δ chosen − Δ rejected)", (_Line("rewards/margins", "margin", _DARK),), zero=True),
    _Panel("Penalty", "β λ max(0, −Δ chosen)", (_Line("dpop/penalty", "penalty", VERMILLION),)),
    _Panel(
        "Shares of pairs",
        "",
        (
            _Line("rewards/accuracies", "margin > 0", BLUE),
            _Line("dpop/active_fraction", "penalty active", VERMILLION, "--"),
        ),
    ),
    _Panel("Gradient norm", "", (_Line("grad_norm", "before clipping", _DARK),), log=True),
    _Panel("Learning rate", "", (_Line("learning_rate", "", _DARK),)),
    _Panel("Speed", "tokens per second, all processes", (_Line("tokens/per_second", "", _DARK),), from_zero=True),
    _Panel("Peak memory", "GiB, largest process", (_Line("memory/peak_gib", "", _DARK),), from_zero=True),
    _Panel("Token accuracy", "share of chosen tokens", (_Line("mean_token_accuracy", "", _DARK),)),
)


def draw_metrics(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with a panel for every kind of metric that the run has logged, over optimizer steps.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    figure, grid, panels = _empty_figure(metrics)
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, metrics)
    return png(figure, SCREEN)


def _empty_figure(metrics: Sequence[Mapping[str, Any]]) -> tuple[Figure, Any, list[_Panel]]:
    """The figure, its axes, and the panels to draw in them. Margins are given and not searched for: an engine that
    searches draws everything twice more."""
    panels = [panel for panel in _PANELS if any(_points(metrics, line.key) for line in panel.lines)]
    columns = min(4, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    width, height = _CELL[0] * columns, _CELL[1] * rows
    across, along = _LEFT + _RIGHT, _TOP + _BOTTOM  # inches between axes
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": _LEFT / width,
            "right": 1 - _RIGHT / width,
            "bottom": _BOTTOM / height,
            "top": 1 - _TOP / height,
            "wspace": across / (_CELL[0] - across),
            "hspace": along / (_CELL[1] - along),
        },
    ).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("optimizer step", fontsize=LABEL)
    return figure, grid, panels


def _draw(axes: Axes, panel: _Panel, metrics: Sequence[Mapping[str, Any]]) -> None:
    finish(axes, panel.title, axes.get_xlabel(), panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if panel.zero:
        axes.axhline(0, **ZERO_LINE)
    values: list[float] = []
    for line in panel.lines:
        trained, evaluated = _points(metrics, line.key), _points(metrics, f"eval_{line.key}")
        values += [value for _, value in trained + evaluated]
        if trained:
            x, y = zip(*trained, strict=True)
            # a single point of a line is no line
            marker = "o" if len(trained) < 3 else ""
            axes.plot(
                x, y, line.style, color=line.color, label=line.label, linewidth=LINE_WIDTH, marker=marker, markersize=3
            )
        if evaluated:
            x, y = zip(*evaluated, strict=True)
            shown = {label for handle in axes.get_lines() if (label := str(handle.get_label())) == "evaluated"}
            label = "_" if shown else "evaluated"  # once for all lines of a panel
            axes.plot(x, y, "o", color=line.color, label=label, markersize=4, markerfacecolor="white")
    if panel.log and values and min(values) > 0:
        axes.set_yscale("log")
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    if panel.from_zero and values:
        axes.set_ylim(0, 1.15 * max(values) or 1.0)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=SMALL, handlelength=1.8)


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that hold a finite number under the key; evenly thinned where there are many."""
    points = [
        (line["step"], float(line[key]))
        for line in metrics
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    stride = math.ceil(len(points) / _MOST_POINTS) or 1
    return points[::-1][::stride][::-1]
