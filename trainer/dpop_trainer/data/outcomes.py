"""What became of tokenised pairs, read from their columns: which are kept, which are bad, and how many of each.

The same for a whole data set and for a part of a stream.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpop_trainer.data.counts import TokeniseCounts
from dpop_trainer.data.pair_weights import WEIGHT_COLUMN
from dpop_trainer.data.records import REF_COLUMNS, TOKEN_COLUMNS

CUT_COLUMNS = ("prompt_cut", "chosen_cut", "rejected_cut")
NOTE_COLUMNS = ("prompt_shortened", "mended_seams", "stray_specials", "left_out", "foreign_turns", "plain_text")
END_COLUMNS = ("chosen_end", "rejected_end")


class Outcomes(NamedTuple):
    """What becomes of the rows of a table of `tokenise.tokenised_features`."""

    names: np.ndarray
    """[rows] of text: kept, identical, identical_after_truncation, no_room, empty, zero_weight, tied or bad."""
    kept: np.ndarray
    """[rows] of bool: the pair is trained on."""
    endless: np.ndarray
    """[rows] of bool: an answer ends in no token at which the model stops."""
    problems: dict[int, str]
    """Row -> why its record cannot be used, in order of the rows: those that are bad."""


def judge_outcomes(
    table: pa.Table,
    *,
    vocab_size: int | None,
    max_positions: int | None,
    stop_ids: Collection[int],
    refs: bool,
    keep_identical: bool,
) -> Outcomes:
    """
    Args:
        table: the columns of `tokenise.tokenised_features`.
        vocab_size: if given, every id must be below it.
        max_positions: if given, no prompt with an answer may have more tokens.
        stop_ids: at which the model stops; none: nothing is said of endless answers.
        refs: the data set brings reference log-probs, so every record must.
        keep_identical: pairs with identical answers are kept.
    """
    problems: dict[int, str] = {}
    if table["problem"].null_count < len(table):
        problems = {row: text for row, text in enumerate(table["problem"].to_pylist()) if text is not None}
    problems = _vocabulary_problems(table, vocab_size) | problems
    if max_positions is not None:
        problems = _position_problems(table, max_positions) | problems
    if refs:
        problems = _ref_problems(table) | problems
    names = _shared_texts(table["outcome"])
    names[list(problems)] = "bad"
    identical = ("identical", "identical_after_truncation") if keep_identical else ()
    kept = np.isin(names, ["kept", *identical])
    return Outcomes(names, kept, _endless(table, stop_ids), dict(sorted(problems.items())))


def count_outcomes(table: pa.Table, outcomes: Outcomes) -> TokeniseCounts:
    """The counts of one table; a row that is not kept is counted once, under why it is not."""
    dropped = Counter(outcomes.names[~outcomes.kept])
    mask = pa.array(outcomes.kept)

    def total(values: Any) -> int:
        return pc.sum(pc.filter(values, mask), min_count=0).as_py()

    return TokeniseCounts(
        num_pairs_in=len(outcomes.kept),
        num_pairs=int(outcomes.kept.sum()),
        skipped_bad=dropped["bad"],
        dropped_empty=dropped["empty"],
        dropped_no_room=dropped["no_room"],
        dropped_identical=dropped["identical"],
        dropped_identical_after_truncation=dropped["identical_after_truncation"],
        dropped_zero_weight=dropped["zero_weight"],
        dropped_tied=dropped["tied"],
        truncated_prompts=total(table["prompt_cut"]),
        truncated_chosen=total(table["chosen_cut"]),
        truncated_rejected=total(table["rejected_cut"]),
        merged_boundaries=total(table["prompt_shortened"]),
        mended_seams=total(table["mended_seams"]),
        stray_specials=total(table["stray_specials"]),
        left_out=total(table["left_out"]),
        foreign_turns=total(table["foreign_turns"]),
        plain_text=total(table["plain_text"]),
        endless_answers=int((outcomes.endless & outcomes.kept).sum()),
        equal_scores=total(pc.equal(table["score_gap"], 0.0)),
        inverted_scores=total(pc.less(table["score_gap"], 0.0)),
        weighted=total(pc.not_equal(table[WEIGHT_COLUMN], 1.0)),
        prompt_tokens=total(pc.list_value_length(table["prompt_ids"])),
        chosen_tokens=total(pc.list_value_length(table["chosen_ids"])),
        rejected_tokens=total(pc.list_value_length(table["rejected_ids"])),
    )


def _shared_texts(column: Any) -> np.ndarray:
    """A column of few different texts as an array that holds each of them once."""
    encoded = pc.dictionary_encode(column).unify_dictionaries()
    if not encoded.num_chunks:
        return np.array([], dtype=object)
    texts = np.array(encoded.chunk(0).dictionary.to_pylist(), dtype=object)
    return texts[np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])]


def _ref_problems(table: pa.Table) -> dict[int, str]:
    cut = (
        "ref_chosen_logps: expected a pair that fits max_length, got one that is cut, so the reference log-probs are "
        "not those of its tokens. Raise max_length, or remove the two columns to compute them again."
    )
    absent = (
        "ref_chosen_logps: expected reference log-probs in every record or in none, got a record without. "
        "Add them, or remove the two columns."
    )
    is_cut = np.any([table[column].to_pylist() for column in CUT_COLUMNS], axis=0)
    is_used = _is_used(table)
    is_absent = np.array(table[REF_COLUMNS[0]].is_null().to_pylist())
    return {int(row): absent for row in np.flatnonzero(is_absent & is_used)} | {
        int(row): cut for row in np.flatnonzero(is_cut & is_used & ~is_absent)
    }


def _endless(table: pa.Table, stop_ids: Collection[int]) -> np.ndarray:
    if not stop_ids:
        return np.zeros(len(table), np.bool_)
    chosen, rejected = (np.isin(table[column].to_numpy(), list(stop_ids)) for column in END_COLUMNS)
    return ~(chosen & rejected)


def _position_problems(table: pa.Table, max_positions: int) -> dict[int, str]:
    prompt, chosen, rejected = (pc.list_value_length(table[column]).to_numpy() for column in TOKEN_COLUMNS)
    lengths = prompt + np.maximum(chosen, rejected)
    return {
        int(row): f"prompt_ids: expected at most {max_positions} tokens with the longer answer, for as many positions "
        f"has the model learned, got {lengths[row]}. Set max_length to {max_positions} or less."
        for row in np.flatnonzero((lengths > max_positions) & _is_used(table))
    }


def _is_used(table: pa.Table) -> np.ndarray:
    """[rows] of bool: the pair is one that is trained on, or would be with `keep_identical`."""
    return np.isin(table["outcome"].to_pylist(), ["kept", "identical", "identical_after_truncation"])


def _vocabulary_problems(table: pa.Table, vocab_size: int | None) -> dict[int, str]:
    bound = ">= 0" if vocab_size is None else f"in [0, {vocab_size})"
    problems: dict[int, str] = {}
    for column in TOKEN_COLUMNS:
        limits = pc.min_max(pc.list_flatten(table[column])).as_py()
        if limits["min"] is None:  # no ids at all
            continue
        if limits["min"] >= 0 and (vocab_size is None or limits["max"] < vocab_size):
            continue  # only a column that holds a bad id is looked at row by row
        for row, ids in enumerate(table[column]):
            outside = [i for i in ids.as_py() if i < 0 or (vocab_size is not None and i >= vocab_size)]
            if outside:
                problems.setdefault(
                    row,
                    f"{column}: expected ids {bound}, got {outside[0]}. "
                    "Use the tokenizer of the model that is trained.",
                )
    return problems
