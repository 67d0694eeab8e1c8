"""A pair as three plain texts, whatever its form, and their fingerprints: pairs are compared in bounded memory.

A fingerprint is 64 bits of BLAKE2: among a million pairs, two different texts share one with probability 3e-8.
"""

import hashlib
import re
import unicodedata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpop_trainer.data.records import MessagesPair, TextPair

_SPACES = re.compile(r"\s+")
# soft hyphen, zero-width space and joiners, directional marks, word joiner, byte order mark
_INVISIBLE = re.compile(r"[\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")


class PairTexts(NamedTuple):
    """What a reader of the pair would see."""

    prompt: str
    chosen: str
    rejected: str


class Fingerprints(NamedTuple):
    """Of pairs, all [n] uint64. All but `exact` are of normalised texts, and blind to the prompt's case."""

    exact: NDArray[np.uint64]
    """Prompt, chosen and rejected, to the letter."""
    pair: NDArray[np.uint64]
    swapped: NDArray[np.uint64]
    """The pair with its answers exchanged."""
    prompt: NDArray[np.uint64]
    chosen: NDArray[np.uint64]
    """Prompt and chosen."""
    rejected: NDArray[np.uint64]
    """Prompt and rejected."""

    @classmethod
    def empty(cls, num_pairs: int) -> "Fingerprints":
        return cls(*(np.zeros(num_pairs, np.uint64) for _ in cls._fields))

    def put(self, row: int, texts: PairTexts) -> None:
        """Take down one pair."""
        prompt = normalised(texts.prompt).casefold()
        chosen, rejected = normalised(texts.chosen), normalised(texts.rejected)
        values = (
            fingerprint(*texts),
            fingerprint(prompt, chosen, rejected),
            fingerprint(prompt, rejected, chosen),
            fingerprint(prompt),
            fingerprint(prompt, chosen),
            fingerprint(prompt, rejected),
        )
        for column, value in zip(self, values, strict=True):
            column[row] = value


def pair_texts(pair: Any) -> PairTexts:
    """The texts of a TextPair, MessagesPair or PairIds. Messages become "role: content" lines, ids numbers."""
    if isinstance(pair, TextPair):
        return PairTexts(*pair)
    if isinstance(pair, MessagesPair):
        return PairTexts(_transcript(pair.prompt), _answer(pair.chosen), _answer(pair.rejected))
    return PairTexts(*(" ".join(map(str, ids)) for ids in pair))


def normalised(text: str) -> str:
    """A text without what a reader would not call a difference: the kind and amount of white space, characters that do
    not show, two ways to write one accented letter. Punctuation and case count: "a < b" is not "a <= b", and in
    questions about genotypes "Cc or cc" is not "CC or Cc"."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = _INVISIBLE.sub("", text)
    return _SPACES.sub(" ", text).strip()


def fingerprint(*texts: str) -> int:
    """64 bits that stand for some texts in this order."""
    joined = "".join(f"{len(text)}:{text}" for text in texts)
    return int.from_bytes(hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _transcript(messages: list[dict[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {_content(message)}" for message in messages)


def _answer(messages: list[dict[str, Any]]) -> str:
    return _content(messages[0]) if len(messages) == 1 else _transcript(messages)


def _content(message: dict[str, Any]) -> str:
    return message["content"] if "content" in message else str(message.get("tool_calls"))
