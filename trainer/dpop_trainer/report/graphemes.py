"""What a reader takes for one character, and how many columns of a terminal it fills.

    é (e + accent)   की (letter + vowel sign)   👩‍👩‍👧 (three people, joined)   🇫🇷 (two letters)        one each

A rule of thumb, not all of Unicode Standard Annex 29: enough that no mark falls into the middle of what is seen.
"""

import unicodedata
from collections.abc import Iterator

_JOINER = "\u200d"


def graphemes(text: str) -> Iterator[str]:
    """The text in pieces that a mark, a colour or a cut must not divide; joined they are the text."""
    start = 0
    for position in range(1, len(text)):
        if not _continues(text, start, position):
            yield text[start:position]
            start = position
    if text:
        yield text[start:]


def columns(text: str) -> int:
    """Columns of a terminal that the text fills: Chinese, Japanese and Korean characters and emoji are two wide."""
    return sum(_columns(grapheme) for grapheme in graphemes(text))


def pad(text: str, width: int) -> str:
    """The text, filled up with spaces on the right to so many columns; `ljust` counts characters."""
    return text + " " * (width - columns(text))


def pad_left(text: str, width: int) -> str:
    """The same with the spaces on the left."""
    return " " * (width - columns(text)) + text


def _continues(text: str, start: int, position: int) -> bool:
    """Whether the character at `position` belongs to the piece that begins at `start`."""
    character, before = text[position], text[position - 1]
    if character < "\u0300":
        return False
    if character == _JOINER or unicodedata.category(character).startswith("M"):
        return before not in "\r\n"
    if before == _JOINER:
        # after a joiner an emoji or the consonant of a conjunct goes on; a letter of a joining script does not
        return _is_pictograph(character)
    if "\U0001f3fb" <= character <= "\U0001f3ff" or "\U000e0020" <= character <= "\U000e007f":  # skin, flag of a region
        return _is_pictograph(text[start])
    return _is_flag_letter(character) and _is_flag_letter(text[start]) and position == start + 1


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _is_pictograph(character: str) -> bool:
    return character >= "\U0001f000" or unicodedata.category(character) == "So"


def _columns(grapheme: str) -> int:
    first = grapheme[0]
    if unicodedata.category(first) in ("Mn", "Me", "Cc", "Cf"):
        return 0
    if "\ufe0f" in grapheme or _is_flag_letter(first):  # shown as an emoji
        return 2
    return 2 if unicodedata.east_asian_width(first) in "WF" else 1
