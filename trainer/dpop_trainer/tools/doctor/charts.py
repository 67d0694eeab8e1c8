"""Charts as inline SVG that takes its colours from the page, so that it reads on light and dark."""

import math
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 40
_NUM_BINS = 40


class Axis(NamedTuple):
    """What is drawn along the x axis."""

    label: str
    lowest: float | None = None
    """Where the axis begins; None: at the lowest value."""
    highest: float | None = None
    """Where it ends; None: at the highest value but the largest hundredth, which is drawn in the last bar."""


def histogram(values: NDArray[Any], axis: Axis) -> str:
    """Counts of values in 40 equal steps; a dashed line marks the median. "" where there is no value."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low = float(values.min()) if axis.lowest is None else axis.lowest
    high = float(np.quantile(values, 0.99)) if axis.highest is None else axis.highest
    low, high = _apart(low, high, axis)
    counts, _ = np.histogram(values.clip(low, high), bins=_NUM_BINS, range=(low, high))
    tallest = int(counts.max())
    x, y = _scale(low, high, _LEFT, _WIDTH - _RIGHT), _scale(0, tallest, _HEIGHT - _BOTTOM, _TOP)
    step = (_WIDTH - _RIGHT - _LEFT) / _NUM_BINS
    bars = "".join(
        f'<rect class="bar" x="{_LEFT + i * step + 0.5:.1f}" y="{y(count):.1f}" width="{step - 1:.1f}" '
        f'height="{_HEIGHT - _BOTTOM - y(count):.1f}"/>'
        for i, count in enumerate(counts.tolist())
        if count
    )
    median = float(np.median(values))
    line = ""
    if low <= median <= high:
        line = f'<line class="median" x1="{x(median):.1f}" x2="{x(median):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
    beyond = axis.highest is None and float(values.max()) > high
    ticks = _x_ticks(low, high, x, beyond=beyond) + _y_ticks(0, tallest, y, whole=True)
    title = f"{axis.label}: {len(values):,} pairs, median {_number(median)}"
    return _svg(title, ticks + bars + line + _x_label(axis.label))


def scatter(x_values: NDArray[Any], y_values: NDArray[Any], x_axis: Axis, y_label: str) -> str:
    """One dot per pair."""
    x_values, y_values = np.asarray(x_values, np.float64), np.asarray(y_values, np.float64)
    known = np.isfinite(x_values) & np.isfinite(y_values)
    x_values, y_values = x_values[known], y_values[known]
    if not len(x_values):
        return ""
    low, high = _ends(x_values, x_axis.lowest, x_axis.highest)
    bottom, top = _ends(y_values, None, None)
    x, y = _scale(low, high, _LEFT, _WIDTH - _RIGHT), _scale(bottom, top, _HEIGHT - _BOTTOM, _TOP)
    dots = "".join(
        f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2"/>'
        for a, b in zip(map(float, x_values), map(float, y_values), strict=True)
    )
    ticks = _x_ticks(low, high, x, beyond=False) + _y_ticks(bottom, top, y, whole=False)
    above = f'<text class="label end" x="{_WIDTH - _RIGHT}" y="{_TOP}">{escape(y_label)}</text>'
    return _svg(f"{y_label} against {x_axis.label}", ticks + dots + above + _x_label(x_axis.label))


def _svg(title: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{inside}</svg>"
    )


def _ends(values: NDArray[np.float64], lowest: float | None, highest: float | None) -> tuple[float, float]:
    low = float(values.min()) if lowest is None else lowest
    high = float(values.max()) if highest is None else highest
    return (low, high) if high > low else (low, low + 1)


def _apart(low: float, high: float, axis: Axis) -> tuple[float, float]:
    """Both ends, half a step around a single value where none of them is given."""
    if high > low:
        return low, high
    return (low - 0.5, low + 0.5) if axis.lowest is None else (low, low + 1)


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _x_ticks(low: float, high: float, x: Any, *, beyond: bool) -> str:
    ticks = _ticks(low, high)
    marks = []
    for tick in ticks:
        text = _number(tick) + ("+" if beyond and tick == ticks[-1] and tick > high - (high - low) / 20 else "")
        marks.append(f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 14}">{text}</text>')
    axis = f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>'
    return axis + "".join(marks)


def _y_ticks(low: float, high: float, y: Any, *, whole: bool) -> str:
    ticks = [tick for tick in _ticks(low, high, 3) if not whole or tick == int(tick)]
    return "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick end" x="{_LEFT - 5}" y="{y(tick) + 3.5:.1f}">{_number(tick)}</text>'
        for tick in ticks
    )


def _x_label(label: str) -> str:
    return f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}">{escape(label)}</text>'


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most `most` + 1."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    return f"{round(value, 10):,.4g}".replace("-", "−")
