"""What charts are made of, as SVG: text, lines, markers, a legend, and a file that stands by itself.

Colours are roles of the palette: an element is drawn in the colour of the `of-ROLE` that it stands in.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from dpop_trainer.report import palette
from dpop_trainer.report.graphemes import columns, graphemes
from dpop_trainer.report.palette import Style
from dpop_trainer.run_folder.files import write_atomically

COLUMN = 6.4
"""The most that a column of text takes on average, in the size that `charts.css` sets."""
CSS = Path(__file__).with_name("charts.css").read_text(encoding="utf-8")

_ROW, _SAMPLE = 17, 34  # of a legend: its height, and the room for a line's sample
_MARGIN = 8  # of a file
_SHOWN = 0.96
"""Of its own pixels, the width that a file asks for: two beside each other on a page of documentation."""


class Panel(NamedTuple):
    """A chart, and what it is called as a file."""

    name: str
    svg: str


class Entry(NamedTuple):
    """What a legend says."""

    name: str
    style: Style
    kind: str = "line"
    """"line", "marker", "points" (hollow markers) or "floor" (a broad line of the page's own)."""


def text(x: float, y: float, what: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(what)}</text>' if what else ""


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def path(points: Sequence[tuple[float, float]], style: Style) -> str:
    """A line through points, in the style's dash."""
    places = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="run"{_dashed(style)} d="M{places}"/>'


def area(points: Sequence[tuple[float, float]]) -> str:
    return f'<path class="band" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}Z"/>'


def marker(style: Style, x: float, y: float, *, hollow: bool = False) -> str:
    """A style's marker at a place."""
    return f'<path class="{"hollow" if hollow else "full"}" d="{_MARKERS[style.marker](x, y, 3.4)}"/>'


def hover(x: float, y: float, told: str, shown: str = "") -> str:
    """What is shown at a place, and what is told to who points at it."""
    return f'<g><title>{escape(told)}</title>{shown}<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="8"/></g>'


def coloured(style: Style, *parts: str) -> str:
    return f'<g class="of-{style.colour}">{"".join(parts)}</g>'


def chart(told: str, width: float, height: float, parts: Sequence[str]) -> str:
    """The whole, with what is read out of it."""
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(told)}">'
        f"<title>{escape(told)}</title>{''.join(parts)}</svg>"
    )


def legend(entries: Sequence[Entry], width: float, top: float) -> tuple[list[str], float]:
    """As many in a row as there is room for -> its parts, and where it ends."""
    if not entries:
        return [], top
    most = int((width - _SAMPLE) / COLUMN)
    parts, x, y = [], 0.0, top + _ROW
    for entry in entries:
        name = cut(entry.name, most)
        taken = _SAMPLE + COLUMN * columns(name)
        if x and x + taken > width:
            x, y = 0.0, y + _ROW
        sample = f"<title>{escape(entry.name)}</title>{_sample(entry, x, y - 4)}"
        parts += [coloured(entry.style, sample), text(x + _SAMPLE, y, name, "name")]
        x += taken + 12
    return parts, y + 6


def cut(name: str, most: int) -> str:
    """A name in so many columns, "…" at its end where it had more."""
    if columns(name) <= most:
        return name
    kept, taken = [], 1
    for grapheme in graphemes(name):
        taken += columns(grapheme)
        if taken > most:
            break
        kept.append(grapheme)
    return "".join(kept) + "…"


def write_svg(panel: Panel, folder: Path) -> Path:
    """A panel as a file of its own, light or dark as its reader's setting is -> its path."""
    rules = f"{palette.classes()}{CSS}.ground {{ fill: var(--page); }}\n"
    # with the colours themselves: not every reader of SVG knows variables
    light, dark = (palette.resolved(rules, scheme) for scheme in ("light", "dark"))
    opening, _, rest = panel.svg.partition(">")
    box = opening.partition('viewBox="')[2].partition('"')[0]
    width, height = (float(side) + 2 * _MARGIN for side in box.split()[2:])
    ground = f'<rect class="ground" x="{-_MARGIN}" y="{-_MARGIN}" width="{width:g}" height="{height:g}" rx="6"/>'
    opening = opening.replace(
        f'<svg class="chart" viewBox="{box}"',
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{_SHOWN * width:.0f}" '
        f'height="{_SHOWN * height:.0f}" viewBox="{-_MARGIN} {-_MARGIN} {width:g} {height:g}"',
    )
    style = f"<style>\n{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n</style>"
    file = folder / f"{panel.name}.svg"
    write_atomically(file, f"{opening}>{style}{ground}{rest}\n".encode("utf-8", "xmlcharrefreplace"))
    return file


def _sample(entry: Entry, x: float, y: float) -> str:
    if entry.kind == "floor":
        return line(x, y, x + 28, y, "floor")
    mark = marker(entry.style, x + 14, y, hollow=entry.kind == "points")
    return mark if entry.kind != "line" else path([(x, y), (x + 28, y)], entry.style) + mark


def _dashed(style: Style) -> str:
    return f' stroke-dasharray="{style.dash}"' if style.dash else ""


def _polygon(*corners: tuple[float, float]) -> Callable[[float, float, float], str]:
    def shape(x: float, y: float, r: float) -> str:
        return "M" + "L".join(f"{x + dx * r:.1f} {y + dy * r:.1f}" for dx, dy in corners) + "Z"

    return shape


def _circle(x: float, y: float, r: float) -> str:
    return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"


def _turned(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """By an eighth."""
    return [(0.7 * (x - y), 0.7 * (x + y)) for x, y in corners]


_PLUS = [(-0.35, -1.3), (0.35, -1.3), (0.35, -0.35), (1.3, -0.35), (1.3, 0.35), (0.35, 0.35)]
_PLUS += [(-x, -y) for x, y in _PLUS]
_MARKERS: dict[str, Callable[[float, float, float], str]] = {
    "circle": _circle,
    "square": _polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": _polygon((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "down": _polygon((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    "diamond": _polygon((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "plus": _polygon(*_PLUS),
    "cross": _polygon(*_turned(_PLUS)),
}
