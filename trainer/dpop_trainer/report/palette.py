"""Every colour of every report, said once: by what it stands for, on a light and on a dark page.

Figures and pages name a colour by its role; which of the two is shown is the reader's setting. What is read or drawn
stands out from the page and from its boxes by a contrast of 4.5 to 1 or more (WCAG 2.2, 1.4.3). Series differ in dash
and marker too, so that they read in grey and by readers who see colours otherwise.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Colour(NamedTuple):
    """On a light and on a dark page."""

    light: str
    dark: str


PAGES = {
    "page": Colour("#ffffff", "#17171b"),
    "box": Colour("#f5f5f8", "#212128"),
}
"""What everything stands on."""
MARKS = {
    "chosen-mark": Colour("#cde7f7", "#10415e"),
    "rejected-mark": Colour("#fbd9c4", "#6b3010"),
}
"""Behind words of an answer that differ from the other one's."""
RULES = {"line": Colour("#d5d5dc", "#3d3d47")}
"""Lines between rows and behind a chart, which nothing depends on."""
INKS = {
    "ink": Colour("#1b1b1f", "#e9e9ee"),
    "soft": Colour("#5d5d66", "#a5a5b0"),
    "chosen": Colour("#0068a3", "#56b4e9"),
    "rejected": Colour("#b04500", "#ff9e5e"),
    "dpop": Colour("#00745a", "#3ecf9d"),
    "dpo": Colour("#9c3b78", "#ea8fbe"),
    "sft": Colour("#5d5d66", "#a5a5b0"),
    "ipo": Colour("#7d5c00", "#e3b74a"),
    "slic": Colour("#5847c2", "#aea2ff"),
    "red": Colour("#a52a35", "#ff8f96"),
    "teal": Colour("#0b6e79", "#5fd0dc"),
    "olive": Colour("#4d6a17", "#a9cf63"),
    "serious": Colour("#b3261e", "#ff8a80"),
    "warning": Colour("#855600", "#f0b95a"),
}
"""Text, lines and markers. Gained and lost tokens take those of chosen and rejected answers."""
COLOURS = {**PAGES, **MARKS, **RULES, **INKS}


class Style(NamedTuple):
    """How a series is drawn."""

    colour: str
    """A role of `COLOURS`."""
    dash: str = ""
    marker: str = "circle"


_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "1 2", "12 3")
_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down", "plus")

CHOSEN, REJECTED = Style("chosen"), Style("rejected", "7 3", "square")
BEFORE, AT, AFTER = Style("chosen", "2 3", "triangle"), Style("chosen", "9 3 2 3", "diamond"), Style("chosen")
"""The chosen answers' tokens around the edit."""
PLAIN = Style("ink")
METHODS = {
    "DPOP": Style("dpop"),
    "DPO": Style("dpo", "7 3", "square"),
    "SFT": Style("sft", "1 2", "plus"),
    "IPO": Style("ipo", "2 3", "triangle"),
    "SLIC": Style("slic", "9 3 2 3", "diamond"),
}
SERIES = (
    *METHODS.values(),
    Style("red", "5 2", "cross"),
    Style("teal", "12 3", "down"),
    Style("olive", "2 3", "circle"),
)
"""For things without a colour of their own, in this order."""
_OTHERS = SERIES[len(METHODS) :]


def method_styles(names: Iterable[str]) -> list[Style]:
    """A style per method: its loss's colour whatever else is shown, and of one loss's variants ("DPOP, λ = 5") another
    dash and marker each."""
    seen: Counter[str] = Counter()
    others: dict[str, Style] = {}
    styles = []
    for name in names:
        loss = re.split(r"[\s,+]", name, maxsplit=1)[0].upper()
        style = METHODS.get(loss) or others.setdefault(loss, _OTHERS[len(others) % len(_OTHERS)])
        shift = seen[loss]
        seen[loss] += 1
        if shift:
            place = _MARKERS.index(style.marker) + shift
            style = Style(style.colour, _DASHES[place % len(_DASHES)], _MARKERS[place % len(_MARKERS)])
        styles.append(style)
    return styles


def variables() -> str:
    """The palette as CSS variables, of a light and of a dark page."""

    def of(scheme: str) -> str:
        return " ".join(f"--{role}: {getattr(colour, scheme)};" for role, colour in COLOURS.items())

    return (
        f":root {{ color-scheme: light dark; {of('light')} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {of('dark')} }} }}\n"
    )


def classes() -> str:
    """A class `of-ROLE` for whatever takes a role as its own colour."""
    return "".join(f".of-{role} {{ color: var(--{role}); }}\n" for role in INKS)


def resolved(css: str, scheme: str) -> str:
    """CSS with a scheme's colours in place of the variables."""
    return re.sub(r"var\(--([\w-]+)\)", lambda found: getattr(COLOURS[found[1]], scheme), css)
