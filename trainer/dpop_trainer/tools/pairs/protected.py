"""Stretches of an answer that no rule edits: a number changed there makes no wrong answer but a broken one.

drawing code        [asy] draw((0,0)--(3,4)); [/asy]
code fences         ```python ... ``` (which the rule `code` is for)
calculator marks    <<48/2=24>>
URLs                https://example.org/a?page=2
dates               2024-03-15, 3/15/2024, March 15, 2024
"""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

CODE_FENCES = "code fences"
FENCE = re.compile(r"```[^\n`]*\n(?P<code>.*?)(?:```|\Z)", re.DOTALL)
CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_DAY = r"(?:[12][0-9]|3[01]|0?[1-9])"
_YEAR = r"(?:1[5-9]|20)[0-9]{2}"
PROTECTED = {
    "drawing code": re.compile(
        r"\[asy\].*?(?:\[/asy\]|\Z)|\\begin\{(?P<name>asy|tikzpicture)\}.*?(?:\\end\{(?P=name)\}|\Z)", re.DOTALL
    ),
    CODE_FENCES: FENCE,
    "calculator marks": CALCULATOR_MARK,
    "URLs": re.compile(r"\b(?:https?://|www\.)[^\s<>\"]+"),
    "dates": re.compile(
        rf"""(?<![\w./-]) (?: {_YEAR}-(?:0[1-9]|1[0-2])-{_DAY} | {_DAY}[/.]{_DAY}[/.]{_YEAR}
               | {_DAY}(?:st|nd|rd|th)?[ ](?:of[ ])?{_MONTH}(?:,?[ ]{_YEAR})?
               | {_MONTH}[ ](?:{_DAY}(?:st|nd|rd|th)?(?:,?[ ]{_YEAR})?|{_YEAR})
             ) (?![\w/-]|[.,][0-9])""",
        re.VERBOSE,
    ),
}
"""Kind -> its spans. A new kind is one line here, in the docstring above and in docs/pairs.md."""

_Place = TypeVar("_Place")


def outside_protected(
    text: str, places: Iterable[_Place], bounds: Callable[[_Place], tuple[int, int]], *, without: str = ""
) -> tuple[list[_Place], tuple[str, ...]]:
    """The places of a text that touch no protected span, and the kinds of span that the others touch.

    Args:
        text: an answer.
        places: where it could be edited.
        bounds: a place -> its first character and one past its last.
        without: a kind that is not protected.
    """
    spans = [
        (*match.span(), kind)
        for kind, pattern in PROTECTED.items()
        if kind != without
        for match in pattern.finditer(text)
    ]
    kept, spared = [], dict.fromkeys((), None)
    for place in places:
        start, end = bounds(place)
        kinds = [kind for first, last, kind in spans if start < last and end > first]
        if kinds:
            spared |= dict.fromkeys(kinds)
        else:
            kept.append(place)
    return kept, tuple(kind for kind in PROTECTED if kind in spared)
