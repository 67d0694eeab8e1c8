"""What a reader takes for one character, and how many columns of a terminal it fills.

é (e + accent)   की (letter + vowel sign)   👩‍👩‍👧 (three people, joined)   🇫🇷 (two letters)        one each
"""

import unicodedata
from collections.abc import Iterator

import regex

_GRAPHEME = regex.compile(r"\X")
_FLAG_LETTER = regex.compile(r"\p{Regional_Indicator}")
_NO_COLUMN = ("Mn", "Mc", "Me", "Cc", "Cf")  # marks, and what shows nothing


def graphemes(text: str) -> Iterator[str]:
    """The text in pieces that a mark, a colour or a cut must not divide; joined they are the text.

    Source: extended grapheme clusters of Unicode Standard Annex 29.
    """
    return (match.group() for match in _GRAPHEME.finditer(text))


def columns(text: str) -> int:
    """Columns of a terminal that the text fills: Chinese, Japanese and Korean characters and emoji are two wide."""
    return sum(_columns(grapheme) for grapheme in graphemes(text))


def pad(text: str, width: int) -> str:
    """The text, filled up with spaces on the right to so many columns; `ljust` counts characters."""
    return text + " " * (width - columns(text))


def pad_left(text: str, width: int) -> str:
    """The same with the spaces on the left."""
    return " " * (width - columns(text)) + text


def _columns(grapheme: str) -> int:
    first = grapheme[0]
    if unicodedata.category(first) in _NO_COLUMN:
        return 0
    # whatever is joined to a wide character, or makes an emoji of a letter, stays within two columns
    if "\ufe0f" in grapheme or _FLAG_LETTER.match(first) or unicodedata.east_asian_width(first) in "WF":
        return 2
    return sum(unicodedata.category(character) not in _NO_COLUMN for character in grapheme)
