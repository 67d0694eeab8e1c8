"""What can be measured of a pair without a model, in one pass over all pairs and a few bytes of memory for each.

    distance        Levenshtein distance of the answers / length of the longer one: 0 the same, 1 nothing in common
    prefix, suffix  how many items both answers begin, and then end, with
    ratio           chosen / rejected length

An item is a token where there is a tokenizer, else a character. The EOS token that ends every answer is not counted.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm

from dpop_trainer.data.edits import common_prefix_length, common_suffix_length
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import TOKEN_COLUMNS
from dpop_trainer.data.truncate import TruncationMode, truncate_pair
from dpop_trainer.measure.surface import SurfaceSample
from dpop_trainer.tools.doctor.pair_file import PairFile, rows_of
from dpop_trainer.tools.doctor.texts import Fingerprints, PairTexts, pair_texts

_BATCH = 1000
HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffd]")
"""A character that shows nothing, or not itself, and that no text needs."""

MAX_COMPARED = 20_000
"""Items of an answer that the edit distance looks at: its cost grows with the product of both lengths."""

# what becomes of a pair under max_length
FITS, CUT, NO_ROOM, SAME_AFTER_CUT, EMPTY = range(5)


class Measures(NamedTuple):
    """One entry per pair, all [n]. Token columns are -1 (distance: NaN) where there is no tokenizer or no token."""

    prompt_chars: NDArray[np.int32]
    chosen_chars: NDArray[np.int32]
    rejected_chars: NDArray[np.int32]
    char_distance: NDArray[np.float32]
    prompt_tokens: NDArray[np.int32]
    chosen_tokens: NDArray[np.int32]
    """As trained on, EOS included."""
    rejected_tokens: NDArray[np.int32]
    token_distance: NDArray[np.float32]
    prefix: NDArray[np.int32]
    """Tokens, or characters without a tokenizer."""
    suffix: NDArray[np.int32]
    chosen_length: NDArray[np.int32]
    """Of the chosen answer in the items of prefix and suffix, EOS not included."""
    rejected_length: NDArray[np.int32]
    outcome: NDArray[np.int8]
    """FITS, CUT, NO_ROOM, SAME_AFTER_CUT under max_length; EMPTY: an answer without tokens."""
    identical: NDArray[np.bool_]
    """Both answers have the same tokens (without a tokenizer: characters)."""
    hidden_characters: NDArray[np.bool_]
    """A text holds control or bidirectional formatting characters, or U+FFFD, which replaces broken ones."""

    @classmethod
    def empty(cls, num_pairs: int) -> "Measures":
        def column(name: str) -> NDArray[Any]:
            if "distance" in name:
                return np.full(num_pairs, np.nan, np.float32)
            kind = {"outcome": np.int8, "identical": np.bool_, "hidden_characters": np.bool_}.get(name, np.int32)
            return np.full(num_pairs, 0 if kind is not np.int32 else -1, kind)

        return cls(**{name: column(name) for name in cls._fields})

    @property
    def distance(self) -> NDArray[np.float32]:
        """Of tokens where there are any, else of characters."""
        return self.token_distance if (self.chosen_tokens >= 0).any() else self.char_distance

    @property
    def ratio(self) -> NDArray[np.float64]:
        """Chosen / rejected length; NaN where a length is 0 or unknown."""
        chosen, rejected = self.chosen_length.astype(float), self.rejected_length.astype(float)
        return np.divide(chosen, rejected, out=np.full(len(chosen), np.nan), where=(chosen > 0) & (rejected > 0))

    @property
    def length(self) -> NDArray[np.int32]:
        """Tokens of the prompt and the longer answer: the `max_length` that the pair needs. -1 without a tokenizer."""
        longest = np.maximum(self.chosen_tokens, self.rejected_tokens)
        return np.where(longest >= 0, self.prompt_tokens + longest, -1)


def measure_pairs(
    pair_file: PairFile,
    tokenised: Dataset | None,
    *,
    eos_token_id: int | None = None,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    sample: SurfaceSample | None = None,
    desc: str | None = "Measuring pairs",
) -> tuple[Measures, Fingerprints]:
    """
    Args:
        pair_file: the pairs.
        tokenised: the same pairs from `tokenise_pairs`, not truncated and with identical ones; None without tokenizer.
        eos_token_id: what ends an answer and is not compared.
        max_length: what the training run will use.
        truncation_mode: likewise.
        sample: is shown each pair of texts or messages.
        desc: of the progress bar; None shows none.
    """
    num_pairs = pair_file.num_pairs
    measures, fingerprints = Measures.empty(num_pairs), Fingerprints.empty(num_pairs)
    ids_of_row = iter(()) if tokenised is None else _ids(tokenised)
    next_row, next_ids = next(ids_of_row, (-1, None))
    with tqdm(total=num_pairs, desc=desc, disable=desc is None, unit=" pairs") as bar:
        for row, pair in enumerate(pair_file.pairs()):
            texts = pair_texts(pair)
            _put_texts(measures, row, texts, by_character=tokenised is None)
            fingerprints.put(row, texts)
            if sample is not None and not isinstance(pair, PairIds):
                sample.add(*texts)
            if row == next_row:
                assert next_ids is not None
                _put_ids(measures, row, next_ids, eos_token_id, max_length, truncation_mode)
                next_row, next_ids = next(ids_of_row, (-1, None))
            elif tokenised is not None:
                measures.outcome[row] = EMPTY
            if row % _BATCH == _BATCH - 1:
                bar.update(_BATCH)
        bar.update(num_pairs - bar.n)
    return measures, fingerprints


def fingerprints_of(pair_file: PairFile, *, desc: str | None = None) -> Fingerprints:
    """The fingerprints alone, of pairs to compare with."""
    fingerprints = Fingerprints.empty(pair_file.num_pairs)
    pairs = tqdm(pair_file.pairs(), total=pair_file.num_pairs, desc=desc, disable=desc is None, unit=" pairs")
    for row, pair in enumerate(pairs):
        fingerprints.put(row, pair_texts(pair))
    return fingerprints


def normalised_distance(chosen: Sequence[Any], rejected: Sequence[Any]) -> float:
    """Levenshtein distance by the length of the longer one, of the first `MAX_COMPARED` items; 0 of two empty ones."""
    return Levenshtein.normalized_distance(chosen[:MAX_COMPARED], rejected[:MAX_COMPARED])


def without_eos(ids: list[int], eos_token_id: int | None) -> list[int]:
    """An answer's ids less the EOS that ends it."""
    return ids[:-1] if ids and ids[-1] == eos_token_id else ids


def outcome_under(ids: PairIds, max_length: int | None, truncation_mode: TruncationMode) -> int:
    """What becomes of a pair with tokens in both answers."""
    length = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
    if max_length is None or length <= max_length:
        return FITS
    cut = truncate_pair(ids, max_length, truncation_mode)
    if cut is None:
        return NO_ROOM
    if cut.chosen_ids == cut.rejected_ids and ids.chosen_ids != ids.rejected_ids:
        return SAME_AFTER_CUT
    return CUT


def _put_texts(measures: Measures, row: int, texts: PairTexts, *, by_character: bool) -> None:
    chosen, rejected = texts.chosen, texts.rejected
    measures.prompt_chars[row] = len(texts.prompt)
    measures.chosen_chars[row] = len(chosen)
    measures.rejected_chars[row] = len(rejected)
    measures.char_distance[row] = normalised_distance(chosen, rejected)
    measures.hidden_characters[row] = any(has_hidden_characters(text) for text in texts)
    if by_character:
        _put_overlap(measures, row, chosen, rejected)
        measures.identical[row] = chosen == rejected


def _put_ids(
    measures: Measures,
    row: int,
    ids: PairIds,
    eos_token_id: int | None,
    max_length: int | None,
    truncation_mode: TruncationMode,
) -> None:
    chosen, rejected = without_eos(ids.chosen_ids, eos_token_id), without_eos(ids.rejected_ids, eos_token_id)
    measures.prompt_tokens[row] = len(ids.prompt_ids)
    measures.chosen_tokens[row] = len(ids.chosen_ids)
    measures.rejected_tokens[row] = len(ids.rejected_ids)
    measures.token_distance[row] = normalised_distance(chosen, rejected)
    measures.identical[row] = ids.chosen_ids == ids.rejected_ids
    _put_overlap(measures, row, chosen, rejected)
    measures.outcome[row] = outcome_under(ids, max_length, truncation_mode)


def _put_overlap(measures: Measures, row: int, chosen: Sequence[Any], rejected: Sequence[Any]) -> None:
    prefix = common_prefix_length(chosen, rejected)
    measures.prefix[row] = prefix
    measures.suffix[row] = common_suffix_length(chosen, rejected, prefix)
    measures.chosen_length[row] = len(chosen)
    measures.rejected_length[row] = len(rejected)


def has_hidden_characters(text: str) -> bool:
    """Control characters other than line breaks and tabs, bidirectional overrides, U+FFFD."""
    return HIDDEN.search(text) is not None


def _ids(tokenised: Dataset) -> Iterator[tuple[int, PairIds]]:
    for record in rows_of(tokenised.select_columns(["pair_id", *TOKEN_COLUMNS])):
        yield record["pair_id"], PairIds(*(record[column] for column in TOKEN_COLUMNS))
