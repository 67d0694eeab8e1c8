"""Charts: lines with bands, stems, intervals, histograms, clouds of dots. One panel each, as inline SVG.

A panel's coordinates are about the pixels of a phone, so that its text is of a readable size there; pages put as many
side by side as there is room for. Every number is told on hover.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpop_trainer.report import svg
from dpop_trainer.report.graphemes import columns
from dpop_trainer.report.palette import PLAIN, Style
from dpop_trainer.report.scale import Axis, Scale, number
from dpop_trainer.report.svg import COLUMN, Entry

_TOP, _RIGHT, _UNDER = 48, 16, 36
"""Around what is drawn: heading and unit above, what the last tick needs, ticks and label below."""
_ROW = 34  # of intervals
_DIGIT = 7.3
"""Of a tick, in the widest of common fonts: a minus that is cut off at the left is a lie."""
_MOST_MARKERS, _MOST_TOLD = 12, 60  # of a series
_NUM_BINS = 40


class Size(NamedTuple):
    """Of a panel without its legend."""

    width: int
    height: int


SMALL, LARGE = Size(360, 220), Size(400, 280)


class Line(NamedTuple):
    """A series over x. What is not finite is left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style = PLAIN
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lowest and highest at every x."""
    kind: str = "line"
    """"line", "marker", "points" (hollow markers) or "floor", as in `svg.Entry`."""


class Estimate(NamedTuple):
    """A figure and the range in which it lies."""

    name: str
    value: float
    low: float
    high: float
    style: Style
    told: str
    """The figure in words."""


class Frame:
    """A panel with its axes: where values stand, and what is drawn there."""

    def __init__(
        self, title: str, x: Axis, y: Axis, places: Sequence[tuple[float, float]], size: Size, *, told: str = ""
    ) -> None:
        """
        Args:
            title: of the panel.
            x: the axis below.
            y: the axis at the left, whose label stands under the title.
            places: what has to be in it, as values.
            size: of the panel.
            told: what is read out of it; by default the title.
        """
        self.told, self.size = told or title, size
        self.top, self.bottom, self.right = float(_TOP), float(size.height - _UNDER), float(size.width - _RIGHT)
        self.y = Scale.over([value for _, value in places], y, self.bottom, self.top, room=0.0 if y.whole else 0.06)
        y_ticks = self.y.ticks(y, 4)
        self.left = max(30.0, 8 + _DIGIT * max((columns(told) for _, told in y_ticks), default=0))
        self.x = Scale.over([value for value, _ in places], x, self.left, self.right)
        self.parts = [svg.text(0, 14, title, "heading"), svg.text(0, 32, y.label, "unit")]
        for value, label in y_ticks:
            height = self.y(value)
            self.parts.append(svg.line(self.left, height, self.right, height, "grid"))
            self.parts.append(svg.text(self.left - 6, height + 4, label, "tick end"))
        for value, label in self.x.ticks(x, 5):
            self.parts.append(svg.text(self.x(value), self.bottom + 15, label, "tick middle"))
        self.parts.append(svg.line(self.left, self.bottom, self.right, self.bottom, "axis"))
        self.parts.append(svg.text((self.left + self.right) / 2, size.height - 4, x.label, "unit middle"))

    def across(self, value: float, kind: str = "zero") -> None:
        """A line at a value of y, where it is within the panel."""
        if self.y.low <= value <= self.y.high:
            self.parts.append(svg.line(self.left, self.y(value), self.right, self.y(value), kind))

    def upright(self, value: float, kind: str) -> None:
        """A line at a value of x, where it is within the panel."""
        if self.x.low <= value <= self.x.high:
            self.parts.append(svg.line(self.x(value), self.top, self.x(value), self.bottom, kind))

    def drawn(self, legend: Sequence[Entry] = ()) -> str:
        """The panel, its legend below."""
        below, height = svg.legend(legend, self.size.width, self.size.height)
        return svg.chart(self.told, self.size.width, height, [*self.parts, *below])


def lines(
    title: str,
    series: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    size: Size = SMALL,
    zero: bool = False,
    origin: bool = False,
) -> str:
    """Lines over a common axis; a legend where there is more than one.

    Args:
        title: of the panel.
        series: what is drawn, the last on top.
        x: the axis below.
        y: the axis at the left.
        size: of the panel.
        zero: draw a line at y = 0, which then is in the panel.
        origin: draw a line at x = 0.
    """
    drawn = [(one, _finite(one, y)) for one in series]
    places = [place for _, points in drawn for place in points]
    places += [(a, b) for one in series if one.band for side in one.band for a, b in zip(one.x, side, strict=True)]
    frame = Frame(title, x, y, places + ([(places[0][0], 0.0)] if zero and places else []), size)
    if zero:
        frame.across(0.0)
    if origin:
        frame.upright(0.0, "median")
    for one, points in drawn:
        frame.parts.append(svg.coloured(one.style, *_series(frame, one, points, x.label)))
    shown = [one for one, points in drawn if points]
    return frame.drawn([Entry(one.name, one.style, one.kind) for one in shown] if len(shown) > 1 else [])


def stems(
    title: str,
    groups: Sequence[str],
    series: Mapping[str, tuple[Style, Sequence[float]]],
    y: Axis,
    *,
    size: Size = SMALL,
) -> str:
    """A stem from zero per series in each group, its number at the end.

    Args:
        title: of the panel.
        groups: what stands below, from left to right.
        series: by name its style and a value per group, NaN where there is none.
        y: the axis at the left.
        size: of the panel.
    """
    shift = 0.74 / max(1, len(series))
    ticks = tuple((float(place), name) for place, name in enumerate(groups))
    values = [0.0, *(value for _, of_groups in series.values() for value in of_groups if math.isfinite(value))]
    several = len(series) > 3  # numbers would stand on each other
    room = 0.0 if several else 0.1 * (max(values) - min(values))  # for the numbers
    ends = [min(values) - room * (min(values) < 0), max(values) + room * (max(values) > 0)]
    x = Axis("", -0.5, len(groups) - 0.5, ticks=ticks)
    frame = Frame(title, x, y, [(0.0, end) for end in ends], size)
    frame.across(0.0)
    for place, (name, (style, of_groups)) in enumerate(series.items()):
        for group, value in enumerate(of_groups):
            if not math.isfinite(value):
                continue
            at = frame.x(group + (place - (len(series) - 1) / 2) * shift)
            top = frame.y(value)
            parts = [svg.line(at, frame.y(0), at, top, "stem"), svg.marker(style, at, top)]
            if not several:
                parts.append(
                    svg.text(at, top + (-8 if value >= 0 else 17), number(float(f"{value:.2g}")), "tick middle")
                )
            told = f"{name}, {groups[group]}: {number(value)}"
            frame.parts.append(svg.coloured(style, svg.hover(at, top, told, "".join(parts))))
    entries = [Entry(name, style, "marker") for name, (style, _) in series.items()]
    return frame.drawn(entries if len(entries) > 1 else [])


def intervals(title: str, rows: Sequence[Estimate], label: str) -> str:
    """A row per figure, a dot on the range in which it lies; a line at zero.

    Args:
        title: of the panel.
        rows: from above.
        label: of the axis below.
    """
    top = _TOP - 16  # there is no unit above
    size = Size(SMALL.width, top + _ROW * len(rows) + _UNDER)
    values = [0.0, *(value for row in rows for value in (row.value, row.low, row.high) if math.isfinite(value))]
    places = [(value, 0.0) for value in values]
    no_ticks = Axis("", 0, 1, ticks=((-1.0, ""),))
    frame = Frame(title, Axis(label), no_ticks, places, size)
    frame.top = float(top)
    frame.upright(0.0, "zero")
    for place, row in enumerate(rows):
        middle = frame.top + _ROW * place + 24
        most = int((frame.right - frame.left) / COLUMN)
        parts = [svg.text(frame.left, middle - 9, svg.cut(f"{row.name}: {row.told}", most), "name")]
        at = frame.x(row.value)
        if math.isfinite(row.low) and math.isfinite(row.high):
            ends = frame.x(row.low), frame.x(row.high)
            parts.append(svg.line(ends[0], middle, ends[1], middle, "whisker"))
            parts += [svg.line(end, middle - 4, end, middle + 4, "whisker") for end in ends]
        parts.append(svg.hover(at, middle, f"{row.name}: {row.told}", svg.marker(row.style, at, middle)))
        frame.parts.append(svg.coloured(row.style, *parts))
    return frame.drawn()


def histogram(title: str, values: NDArray[Any], x: Axis) -> str:
    """Counts of values in 40 equal steps, a dashed line at the median; "" where there is no value.

    Where the axis has no end of its own, the largest hundredth of the values stands in the last bar.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    high = float(np.quantile(values, 0.99)) if x.high is None else x.high
    scale = Scale.over([float(values.min()), high], x, 0, 1)
    low, high = scale.low, scale.high
    counts, _ = np.histogram(values.clip(low, high), bins=_NUM_BINS, range=(low, high))
    median = float(np.median(values))
    told = f"{title}: {len(values):,} pairs, median {number(median)}"
    beyond = float(values.max()) > high
    y = Axis("pairs", 0, float(counts.max()), whole=True)
    ends = x._replace(low=low, high=high, label=f"{x.label}{' (the last bar: and more)' if beyond else ''}".strip())
    frame = Frame(title, ends, y, [], SMALL, told=told)
    step = (high - low) / _NUM_BINS
    for place, count in enumerate(counts.tolist()):
        if count:
            left, right = frame.x(low + place * step), frame.x(low + (place + 1) * step)
            span = f"{number(low + place * step)} to {number(low + (place + 1) * step)}: {count:,}"
            bar = (
                f'<rect class="bar" x="{left + 0.5:.1f}" y="{frame.y(count):.1f}" width="{right - left - 1:.1f}" '
                f'height="{frame.bottom - frame.y(count):.1f}"><title>{span}</title></rect>'
            )
            frame.parts.append(svg.coloured(_DATA, bar))
    frame.upright(median, "median")
    return frame.drawn()


def scatter(title: str, x_values: NDArray[Any], y_values: NDArray[Any], x: Axis, y: Axis) -> str:
    """One dot per pair; "" where there is none."""
    both = np.stack([np.asarray(x_values, np.float64), np.asarray(y_values, np.float64)], axis=1)
    places = [(float(a), float(b)) for a, b in both[np.isfinite(both).all(axis=1)]]
    if not places:
        return ""
    frame = Frame(title, x, y, places, SMALL)
    dots = [f'<circle class="dot" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2"/>' for a, b in places]
    frame.parts.append(svg.coloured(_DATA, *dots))
    return frame.drawn()


_DATA = Style("teal")
"""Of pairs as such, which are neither answer and no method."""


def _finite(one: Line, y: Axis) -> list[tuple[float, float]]:
    pairs = zip(one.x, one.y, strict=True)
    return [(float(a), float(b)) for a, b in pairs if math.isfinite(b) and (b > 0 or not y.log)]


def _series(frame: Frame, one: Line, points: Sequence[tuple[float, float]], x_label: str) -> list[str]:
    parts = []
    if one.band:
        low, high = ([(frame.x(a), frame.y(b)) for a, b in zip(one.x, side, strict=True)] for side in one.band)
        parts.append(svg.area([*low, *reversed(high)]))
    places = [(frame.x(a), frame.y(b)) for a, b in points]
    if one.kind == "floor":
        return [svg.line(*first, *second, "floor") for first, second in pairwise(places)]
    if one.kind == "line" and len(places) > 1:
        parts.append(svg.path(places, one.style))
    every = max(1, math.ceil(len(places) / (_MOST_MARKERS if one.kind == "line" else _MOST_TOLD)))
    told_every = max(1, math.ceil(len(places) / _MOST_TOLD))
    last = len(places) - 1
    for index, ((a, b), (x, y)) in enumerate(zip(points, places, strict=True)):
        # counted from the end, where a line is looked at most
        is_marked, is_told = (last - index) % every == 0, (last - index) % told_every == 0
        if is_marked or is_told:
            mark = svg.marker(one.style, x, y, hollow=one.kind == "points") if is_marked else ""
            where = f"{x_label} {number(a)}" if x_label else number(a)
            parts.append(svg.hover(x, y, f"{one.name}, {where}: {number(b)}", mark))
    return parts
