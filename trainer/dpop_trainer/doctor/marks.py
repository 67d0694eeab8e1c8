"""Two answers side by side: which of their pieces differ, by the shortest edit between them."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rapidfuzz.distance import Levenshtein

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MAX_BYTES_OF_CHARACTER = 8


class Piece(NamedTuple):
    """A stretch of an answer's text."""

    text: str
    differs: bool


def mark_words(chosen: str, rejected: str) -> tuple[list[Piece], list[Piece]]:
    """The answers cut into words, marks and white space; those outside of the longest common order differ."""
    a, b = _WORDS.findall(chosen), _WORDS.findall(rejected)
    differs_a, differs_b = differing(a, b)
    return _merged(a, differs_a), _merged(b, differs_b)


def mark_tokens(
    chosen_ids: Sequence[int],
    rejected_ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    before: Sequence[int] = (),
) -> tuple[list[Piece], list[Piece]]:
    """The answers cut where their tokens end; the tokens that differ are marked.

    Args:
        chosen_ids: the chosen answer.
        rejected_ids: the rejected one.
        tokenizer: decodes.
        before: tokens that the answers follow: some tokenizers drop the first space of what they decode.
    """
    marked = []
    both = differing(chosen_ids, rejected_ids)
    for ids, differs in zip((chosen_ids, rejected_ids), both, strict=True):
        texts = token_texts(ids, tokenizer, before=before)
        # a character of several tokens stands at the last of them, and differs if any of them does
        flags, pending = [], False
        for text, flag in zip(texts, differs, strict=True):
            pending = pending or flag
            flags.append(pending)
            pending = pending and not text
        marked.append(_merged(texts, flags))
    return marked[0], marked[1]


def token_texts(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", *, before: Sequence[int] = ()) -> list[str]:
    """Each token's part of the decoded text. Of a character that spans tokens, the last has it and the others ""."""
    ids = [*before, *ids]
    start, read = 0, len(before)
    texts = []
    for end in range(len(before) + 1, len(ids) + 1):
        context = _decode(ids[start:read], tokenizer)
        text = _decode(ids[start:end], tokenizer)
        if text.endswith("\ufffd") and end < len(ids) and end - read < _MAX_BYTES_OF_CHARACTER:
            texts.append("")
            continue
        texts.append(text[len(context) :])
        start, read = read, end
    return texts


def differing(a: Sequence[object], b: Sequence[object]) -> tuple[list[bool], list[bool]]:
    """For each item of either sequence, whether the shortest edit between the two deletes, inserts or replaces it."""
    differs_a, differs_b = [False] * len(a), [False] * len(b)
    for edit in Levenshtein.opcodes(a, b):  # type: ignore[arg-type]
        if edit.tag != "equal":
            differs_a[edit.src_start : edit.src_end] = [True] * (edit.src_end - edit.src_start)
            differs_b[edit.dest_start : edit.dest_end] = [True] * (edit.dest_end - edit.dest_start)
    return differs_a, differs_b


def shortened(pieces: Sequence[Piece], context: int) -> list[Piece]:
    """The pieces with long stretches that do not differ cut to `context` characters beside what does, "⋯ n ⋯" between.

    Long stretches that differ keep `8 * context` characters.
    """
    short = []
    for index, (text, differs) in enumerate(pieces):
        head = 8 * context if differs else (context if index else 0)
        tail = 0 if differs else (context if index + 1 < len(pieces) else 0)
        hidden = len(text) - head - tail
        if hidden > context:
            text = f"{text[:head]} ⋯ {hidden:,} characters ⋯ {text[len(text) - tail :]}"
        short.append(Piece(text, differs))
    return short


def _decode(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _merged(texts: Sequence[str], differs: Sequence[bool]) -> list[Piece]:
    pieces: list[Piece] = []
    for text, flag in zip(texts, differs, strict=True):
        if pieces and pieces[-1].differs == flag:
            pieces[-1] = Piece(pieces[-1].text + text, flag)
        elif text:
            pieces.append(Piece(text, flag))
    return pieces
