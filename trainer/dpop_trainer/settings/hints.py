"""Which name was meant by one that does not exist: said only where it is a slip of the hand, or a part of one name."""

import difflib
import re
from collections.abc import Iterable

_TYPO = 0.7  # likeness of two words, below which they are two words


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that differs by slips, by missing words or by its underscores alone; None where none does.

    A name with one word in another's place is another name: `eos_token` is not `pad_token` mistyped.
    """
    found = [(_likeness(_words(name), _words(other)), other) for other in known]
    likeness, other = max(found, key=lambda pair: pair[0], default=(0.0, ""))
    return other if likeness > 0 else None


def _likeness(words: list[str], others: list[str]) -> float:
    """0 where the two are not the same name."""
    joined, other_joined = "".join(words), "".join(others)
    ratio = difflib.SequenceMatcher(None, joined, other_joined).ratio()
    if joined == other_joined:
        return 1.0
    if len(words) == len(others) and all(map(_is_slip, words, others)):
        return ratio
    is_part = len(words) > 1 or len(joined) > 4
    if is_part and len(words) < len(others) and _stand_in(words, others):
        return ratio / 2  # after every slip
    return 0.0


def _is_slip(word: str, other: str) -> bool:
    if re.findall(r"\d", word) != re.findall(r"\d", other):
        return False
    is_beginning = len(word) > 2 and other.startswith(word)
    return word == other or is_beginning or difflib.SequenceMatcher(None, word, other).ratio() >= _TYPO


def _stand_in(words: list[str], others: list[str]) -> bool:
    rest = iter(others)
    return all(word in rest for word in words)  # in this order


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name.lower()) if word]
