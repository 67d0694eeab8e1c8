"""Figures: log-ratios over training, and the change per token around the edit.

Beside colours, line styles, markers and hatches differ, so that the figures read in grey.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpop_trainer.measure.pairs_under_model import PairEvaluation
from dpop_trainer.measure.token_shift import TokenShift
from dpop_trainer.report.figure_text import drawable, families_for
from dpop_trainer.report.signed import signed
from dpop_trainer.run_folder import plot_style
from dpop_trainer.run_folder.plot_style import LABEL, SMALL, ZERO_LINE, finish

_FEW_TOKENS = 0.1
_LEGEND_CHARACTERS = 100
"""Of a row of a legend; a line's sample takes the room of about six."""
_MOST_ACROSS = 3  # methods whose numbers fit side by side over their bars


class _Style(NamedTuple):
    color: str
    linestyle: Any
    marker: str
    hatch: str


_STYLES = (
    _Style(plot_style.VERMILLION, "--", "o", "////"),
    _Style(plot_style.BLUE, "-", "s", ""),
    _Style(plot_style.GREEN, "-.", "^", "...."),
    _Style(plot_style.PURPLE, ":", "D", "xxxx"),
    _Style(plot_style.ORANGE, (0, (6, 1, 1, 1, 1, 1)), "v", "\\\\\\\\"),
    _Style(plot_style.SKY_BLUE, (0, (1, 3)), "P", "++++"),
    _Style(plot_style.BLACK, (0, (8, 3)), "X", "----"),
    _Style(plot_style.GREY, "-", "*", "oooo"),
)


def plot_logratios(histories: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike[str]) -> None:
    """Writes a PNG of the answers' log-ratios over training: chosen left, rejected right, one line per method.

    Args:
        histories: by method, equally long lists "step" (optimizer steps), "chosen" and "rejected": mean over pairs of
            log π - log π_ref of the whole answer, in nats. With "chosen_low", "chosen_high" and the same of "rejected"
            a band is drawn around the line.
        path: the PNG; missing folders are made.

    Raises:
        ValueError: there is no method, or a method's lists are missing or differ in length.
    """
    _check_methods("histories", histories)
    families = families_for(histories)
    for name, history in histories.items():
        lengths = {key: len(history[key]) if key in history else None for key in ("step", "chosen", "rejected")}
        if None in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(f"histories[{name!r}]: expected three lists of one length, got lengths {lengths}.")
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, answer in zip(panels, ("chosen", "rejected"), strict=True):
        axes.axhline(0, **ZERO_LINE)
        for style, (name, history) in zip(_styles(histories), histories.items(), strict=True):
            _line(axes, history["step"], history[answer], style, drawable(name, families))
            if f"{answer}_low" in history:
                low, high = history[f"{answer}_low"], history[f"{answer}_high"]
                axes.fill_between(history["step"], low, high, color=style.color, alpha=0.15, linewidth=0)
        finish(
            axes,
            f"{answer.capitalize()} answers",
            "optimizer step",
            r"$\log\,\pi - \log\,\pi_\mathrm{ref}$ (nats per answer)",
        )
    _legend_below(figure, panels[0], families)
    _save(figure, path)


def plot_token_shift(shifts: Mapping[str, TokenShift], path: str | os.PathLike[str]) -> None:
    """Writes a PNG of the chosen answers' change per token: bars before, at and after the edit, and by distance.

    Offsets with fewer than a tenth of the tokens that the best-filled offset beside the edit has are left out: means
    over a handful of long answers are noise.

    Args:
        shifts: by method, from `token_shift.token_shift`.
        path: the PNG; missing folders are made.

    Raises:
        ValueError: there is no method.
    """
    _check_methods("shifts", shifts)
    families = families_for(shifts)
    shifts = {drawable(name, families): shift for name, shift in shifts.items()}
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    bars, profile = figure.subplots(1, 2, width_ratios=(2, 3))
    _plot_regions(bars, shifts)
    _plot_profile(profile, shifts)
    _legend_below(figure, profile, families)
    _save(figure, path)


def plot_checkpoints(history: Mapping[int, PairEvaluation], path: str | os.PathLike[str]) -> None:
    """Writes a PNG of a run's checkpoints: whole answers left, the chosen answers' tokens around the edit right.

    Args:
        history: by optimizer step, each against the same reference; step 0, where nothing has changed, is added.
        path: the PNG; missing folders are made.

    Raises:
        ValueError: there is no checkpoint.
    """
    if not history:
        raise ValueError("history: expected at least one checkpoint, got none.")
    steps = [0, *history]
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    answers, tokens = figure.subplots(1, 2)
    for style, side in zip(_STYLES, ("rejected", "chosen"), strict=False):
        changes = [0.0, *(getattr(value, f"{side}_logratio") for value in history.values())]
        _line(answers, steps, changes, style, f"{side} answers")
    for style, region in zip(_STYLES, ("after", "before", "at"), strict=False):
        changes = [0.0, *(getattr(value.shift, region).mean_change for value in history.values())]
        _line(tokens, steps, changes, style, f"{region} the edit")
    labels = ("nats per answer", "nats per token")
    titles = ("Whole answers", "The chosen answers' tokens")
    for axes, title, label in zip((answers, tokens), titles, labels, strict=True):
        axes.axhline(0, **ZERO_LINE)
        axes.legend(frameon=False, fontsize=LABEL)
        finish(axes, title, "optimizer step", rf"$\log\,\pi - \log\,\pi_\mathrm{{ref}}$ ({label})")
    _save(figure, path)


def _plot_regions(axes: Axes, shifts: Mapping[str, TokenShift]) -> None:
    width = 0.8 / len(shifts)
    for i, (style, (name, shift)) in enumerate(zip(_styles(shifts), shifts.items(), strict=True)):
        changes = [shift.before.mean_change, shift.at.mean_change, shift.after.mean_change]
        positions = np.arange(3) + (i - (len(shifts) - 1) / 2) * width
        bars = axes.bar(
            positions,
            changes,
            0.92 * width,
            label=name,
            color=style.color,
            hatch=style.hatch,
            edgecolor="white",
            zorder=2,
        )
        many = len(shifts) > _MOST_ACROSS
        axes.bar_label(bars, fmt=_bar_text, padding=2, fontsize=SMALL - 0.5, rotation=90 if many else 0)
    axes.axhline(0, zorder=3, **ZERO_LINE)
    axes.set_xticks(range(3), ["before", "at", "after"])
    axes.margins(y=0.2 if len(shifts) > _MOST_ACROSS else 0.15)  # room for the numbers
    finish(axes, "Around the edit", "chosen answer's tokens, relative to the edit", "mean change (nats per token)")
    axes.grid(visible=False, axis="x")


def _plot_profile(axes: Axes, shifts: Mapping[str, TokenShift]) -> None:
    axes.axhline(0, **ZERO_LINE)
    axes.axvline(0, linestyle=":", **ZERO_LINE)
    for style, (name, shift) in zip(_styles(shifts), shifts.items(), strict=True):
        offsets, changes, counts = shift.profile
        enough = counts >= max(1, _FEW_TOKENS * counts[offsets != 0].max(initial=0))
        _line(axes, offsets[enough], changes[enough], style, name)
    finish(axes, "By distance from the edit", "token offset (0: the edit)", "mean change (nats per token)")


def _line(axes: Axes, x: Any, y: Any, style: _Style, label: str) -> None:
    axes.plot(
        x,
        y,
        label=label,
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        markersize=3,
        markevery=max(1, len(x) // 12),
        linewidth=plot_style.LINE_WIDTH,
    )


def _legend_below(figure: Figure, axes: Axes, families: Sequence[str]) -> None:
    """Outside of the panels, where it hides no line; as many in a row as names of this length have room for."""
    handles, labels = axes.get_legend_handles_labels()
    num_columns = max(1, min(len(labels), _LEGEND_CHARACTERS // (max(map(len, labels)) + 6)))
    font = {"size": LABEL, "family": families}
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False, prop=font)


def _bar_text(value: float) -> str:
    return "" if np.isnan(value) else signed(value).replace("-", "−")


def _styles(methods: Mapping[str, Any]) -> list[_Style]:
    return [_STYLES[i % len(_STYLES)] for i in range(len(methods))]


def _check_methods(name: str, methods: Mapping[str, Any]) -> None:
    if not methods:
        raise ValueError(f"{name}: expected at least one method, got none.")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plot_style.png(figure))
