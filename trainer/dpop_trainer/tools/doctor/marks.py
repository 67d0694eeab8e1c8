"""Two answers side by side: which of their pieces differ, by the shortest edit between them."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rapidfuzz.distance import Levenshtein

from dpop_trainer.report.graphemes import graphemes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# scripts that write no spaces between words: Thai to Tibetan, Myanmar, Khmer, Kana, Chinese characters
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class Piece(NamedTuple):
    """A stretch of an answer's text."""

    text: str
    differs: bool


def mark_words(chosen: str, rejected: str) -> tuple[list[Piece], list[Piece]]:
    """The answers cut into words, marks and white space; those outside of the longest common order differ.

    Where words are written without spaces, each character is one.
    """
    a, b = _words(chosen), _words(rejected)
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
    from dpop_trainer.report import token_text

    return token_text.token_texts(tokenizer, ids, before)


def differing(a: Sequence[object], b: Sequence[object]) -> tuple[list[bool], list[bool]]:
    """For each item of either sequence, whether the shortest edit between the two deletes, inserts or replaces it."""
    differs_a, differs_b = [False] * len(a), [False] * len(b)
    for edit in Levenshtein.opcodes(a, b):
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


def _words(text: str) -> list[str]:
    words: list[str] = []
    kind_before = ""
    for grapheme in graphemes(text):
        first = grapheme[0]
        kind = "space" if first.isspace() else "word" if first == "_" or first.isalnum() else ""
        if kind == "word" and _SPACELESS.match(first):
            kind = ""
        if kind and kind == kind_before:
            words[-1] += grapheme
        else:
            words.append(grapheme)
        kind_before = kind
    return words


def _merged(texts: Sequence[str], differs: Sequence[bool]) -> list[Piece]:
    """Neighbours of one kind as one piece. What a reader takes for one character is not divided."""
    flags = [flag for text, flag in zip(texts, differs, strict=True) for _ in text]
    pieces: list[Piece] = []
    position = 0
    for grapheme in graphemes("".join(texts)):
        flag = any(flags[position : position + len(grapheme)])
        position += len(grapheme)
        if pieces and pieces[-1].differs == flag:
            pieces[-1] = Piece(pieces[-1].text + grapheme, flag)
        else:
            pieces.append(Piece(grapheme, flag))
    return pieces
