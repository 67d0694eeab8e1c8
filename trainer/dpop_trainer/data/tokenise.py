"""Turn a data set of preference pairs into token ids, and count exactly what that changes and drops.

One pass of `Dataset.map`, cached and parallel, writes each pair's ids beside what became of it; the counts are read
from those columns, so they are the same whether the pass ran in one process, in many, or long ago.
"""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from dpop_trainer.data.code_hash import code_hash
from dpop_trainer.data.convert import bad_records, convert_pairs, row_pair
from dpop_trainer.data.counts import TokeniseCounts
from dpop_trainer.data.encode import EncodedPair, Refused, check_tokenizer, encode_records
from dpop_trainer.data.outcomes import CUT_COLUMNS, END_COLUMNS, NOTE_COLUMNS, count_outcomes, judge_outcomes
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.pair_weights import WEIGHT_COLUMN, PairWeight, check_pair_weight, weight_of
from dpop_trainer.data.records import ALL_REF_COLUMNS, TIE, TOKEN_COLUMNS, BadRecord, raise_bad_records
from dpop_trainer.data.sound_cache import map_or_map_anew
from dpop_trainer.data.tokenizer_digest import fingerprint_of
from dpop_trainer.data.truncate import TruncationMode, check_truncation, fitting_length, truncate_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

OnBadRecord = Literal["error", "skip"]

SKIP_REMEDY = "Correct or remove them; or have them left out and listed with on_bad_record='skip'."
_NUM_NAMED = 3
_MUCH_LOST = 0.2  # of the pairs


class NoPairsError(ValueError):
    """Nothing of a data set can be used. Its text begins with "dataset: "."""


def tokenise_pairs(
    dataset: Dataset,
    processing_class: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    keep_identical: bool = False,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    stop_ids: Collection[int] = (),
    on_bad_record: OnBadRecord = "error",
    on_skipped: Callable[[list[BadRecord]], None] | None = None,
    completions: bool = False,
    pair_weight: PairWeight = "none",
    notes: bool = False,
) -> tuple[Dataset, TokeniseCounts]:
    """Tokenise pairs, cut them to length, and drop those that hold no preference.

    Text: special tokens at the beginning are the tokenizer's own; any that it appends are left out, and each answer
    ends with exactly one EOS.

    Messages: the chat template renders prompt and answers, and alone decides how a turn ends. The columns `tools`
    (a list or its JSON) and `chat_template_kwargs` go to the template.

    Token ids: taken as they are.

    Args:
        dataset: pairs in any form of `forms`, or what `read_pairs` made of them.
        processing_class: the model's tokenizer.
        max_length: most tokens of prompt + answer, for each answer. None: no limit.
        truncation_mode: which end of a longer pair is kept, see `truncate_pair`.
        num_proc: processes that tokenise. None: this one.
        keep_identical: keep pairs whose two answers have the same tokens (their margin is always 0).
        vocab_size: if given, every id must be below it.
        max_positions: if given, no prompt with an answer may have more tokens: the positions that the model learned.
        stop_ids: the tokens at which the model stops when it generates, by which answers that do not end are counted.
        on_bad_record: "error" refuses the data set where a record cannot be used; "skip" leaves such records out,
            counts them and names the first in a warning.
        on_skipped: is given the records that "skip" left out.
        completions: take prompt and completion too, for supervised fine-tuning.
        pair_weight: which weights pairs have in a loss, see `pair_weights`.
        notes: keep the columns of `outcomes.NOTE_COLUMNS` and "endless", which say what the counts count.

    Returns:
        The data set with the columns prompt_ids, chosen_ids, rejected_ids (whole answers), pair_id (the pair's row
        in `dataset`) and, if `dataset` has them, ref_chosen_logps, ref_rejected_logps and ref_shared_logps, and weight,
        if not all are 1; and the counts.

    Raises:
        ValueError: the columns are those of no form, or the tokenizer has no EOS token or no chat template where one
            is needed; a record cannot be used (its fields; its prompt has no tokens; the template refuses it; an id
            lies outside the vocabulary; it has more tokens than the model has positions; its reference log-probs are
            those of a pair that is cut) and `on_bad_record` is "error"; or no pair is left.
    """
    check_truncation(max_length, truncation_mode)
    check_on_bad_record(on_bad_record)
    check_pair_weight(pair_weight)
    rows = convert_pairs(dataset, completions=completions, num_proc=num_proc)
    if on_bad_record == "error":
        raise_bad_records("pairs", len(rows), bad_records(rows), SKIP_REMEDY)
    check_tokenizer(processing_class, {kind for kind in rows.unique("kind") if kind is not None})
    refs = [column for column in ALL_REF_COLUMNS if any(logp is not None for logp in rows.unique(column))]
    source = rows.select_columns(["kind", "pair", "problem", "score_gap", WEIGHT_COLUMN, *refs])
    options: dict[str, Any] = {
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "pair_weight": pair_weight,
    }
    mapped = map_or_map_anew(
        source,
        tokenise_rows,
        with_indices=True,
        batched=True,
        fn_kwargs={"tokenizer": processing_class, **options},
        new_fingerprint=fingerprint_of(source, processing_class, **options, refs=refs, code=code_hash(__name__)),
        remove_columns=source.column_names,
        features=tokenised_features(refs),
        num_proc=num_proc,
        desc="Tokenising pairs",
    )
    table = mapped.with_format("arrow")[:]
    outcomes = judge_outcomes(
        table,
        vocab_size=vocab_size,
        max_positions=max_positions,
        stop_ids=stop_ids,
        refs=bool(refs),
        keep_identical=keep_identical,
    )
    places = rows.select(list(outcomes.problems)).select_columns("place")["place"]
    bad = [BadRecord(place, problem) for place, problem in zip(places, outcomes.problems.values(), strict=True)]
    if on_bad_record == "error":
        raise_bad_records("pairs", len(rows), bad, SKIP_REMEDY)
    elif bad:
        warn_skipped(len(rows), bad)
        if on_skipped is not None:
            on_skipped(bad)
    counts = count_outcomes(table, outcomes)
    warn_lost(counts, table["whole_length"].to_pylist(), max_length)
    if not counts.num_pairs:
        raise NoPairsError(
            f"dataset: expected at least one pair that can be used, got none. {counts.summary()} "
            "Raise max_length if prompts leave no room, or look at the answers if they are identical."
        )
    if not outcomes.kept.all():
        mapped = mapped.select(np.flatnonzero(outcomes.kept))
    _logger.info(counts.summary())
    columns = [*TOKEN_COLUMNS, "pair_id", *refs, *([WEIGHT_COLUMN] if counts.weighted else [])]
    if notes:
        mapped = mapped.add_column("endless", outcomes.endless[outcomes.kept].tolist())  # type: ignore[call-arg]
        columns += [*NOTE_COLUMNS, "endless"]
    return mapped.select_columns(columns), counts


def check_on_bad_record(on_bad_record: str) -> None:
    """
    Raises:
        ValueError: it is neither "error" nor "skip".
    """
    if on_bad_record not in get_args(OnBadRecord):
        raise ValueError(f"on_bad_record: expected one of {get_args(OnBadRecord)}, got {on_bad_record!r}.")


def warn_skipped(num_records: int, bad: list[BadRecord]) -> None:
    """Say in the log how many records were left out, and spell the first few out."""
    named = "".join(f"\n  {record.place}: {record.reason}" for record in bad[:_NUM_NAMED])
    more = f"\n  and {len(bad) - _NUM_NAMED} more" if len(bad) > _NUM_NAMED else ""
    _logger.warning("%d of %d records left out, which cannot be used:%s%s", len(bad), num_records, named, more)


def warn_lost(counts: TokeniseCounts, lengths: Iterable[int], max_length: int | None) -> None:
    """Say in the log where more than a fifth of the pairs is lost to `max_length` or to emptiness, and what to set.

    Args:
        counts: what became of the pairs.
        lengths: theirs in tokens before they were cut; 0 where there are none.
        max_length: what they were cut to.
    """
    by_length = counts.dropped_no_room + counts.dropped_identical_after_truncation
    lost = by_length + counts.dropped_empty
    if lost <= _MUCH_LOST * counts.num_pairs_in:
        return
    remedy = "Look at the answers that are empty."
    if by_length:
        fitting = fitting_length(length for length in lengths if length)
        remedy = f"Set max_length to {fitting}, which at least 99% of the pairs fit."
    causes = ((by_length, f"max_length {max_length}"), (counts.dropped_empty, "an empty answer"))
    _logger.warning(
        "%d of %d pairs (%.0f%%) are lost: %s. %s",
        lost,
        counts.num_pairs_in,
        100 * lost / counts.num_pairs_in,
        ", ".join(f"{number} to {cause}" for number, cause in causes if number),
        remedy,
    )


def tokenised_features(refs: list[str]) -> Features:
    """The columns of `tokenise_rows`."""
    return Features(
        {column: List(Value("int32")) for column in TOKEN_COLUMNS}
        | {"pair_id": Value("int64"), "outcome": Value("string"), "problem": Value("string")}
        | {column: Value("bool") for column in NOTE_COLUMNS}
        | {column: Value("int32") for column in END_COLUMNS}
        | {"score_gap": Value("float64"), WEIGHT_COLUMN: Value("float64")}
        | {column: Value("bool") for column in CUT_COLUMNS}
        | {"whole_length": Value("int32")}
        | {column: Value("float64") for column in refs}
    )


def tokenise_rows(
    rows: dict[str, list],
    indices: list[int],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    truncation_mode: TruncationMode,
    pair_weight: PairWeight,
) -> dict[str, list]:
    """Rows of `convert.ROW_FEATURES` -> their token ids and what became of each, as columns; as many as came in."""
    finished, weights = [_bad(problem) for problem in rows["problem"]], [1.0] * len(rows["problem"])
    good = []
    for row, (kind, problem) in enumerate(zip(rows["kind"], rows["problem"], strict=True)):
        if kind == TIE:
            finished[row] = {**_bad(None), "outcome": "tied"}
        if kind == TIE or problem is not None:
            continue
        try:
            weights[row] = weight_of(pair_weight, rows[WEIGHT_COLUMN][row], rows["score_gap"][row])
        except ValueError as error:
            finished[row] = _bad(str(error))
            continue
        if weights[row] == 0:
            finished[row] = {**_bad(None), "outcome": "zero_weight"}
        else:
            good.append(row)
    pairs = [row_pair(rows["kind"][row], rows["pair"][row]) for row in good]
    for row, pair in zip(good, encode_records(pairs, tokenizer), strict=True):
        if isinstance(pair, Refused):
            finished[row] = _bad(pair.reason)
        else:
            finished[row] = _finish_pair(pair, max_length, truncation_mode)
    columns = {column: [row[column] for row in finished] for column in finished[0]}
    refs = {column: rows[column] for column in ALL_REF_COLUMNS if column in rows}
    return {**columns, **refs, "score_gap": rows["score_gap"], WEIGHT_COLUMN: weights, "pair_id": indices}


def _bad(problem: str | None) -> dict[str, Any]:
    """What becomes of a record that cannot be used: no ids."""
    return {
        **PairIds([], [], [])._asdict(),
        **dict.fromkeys(CUT_COLUMNS, False),
        **dict.fromkeys(NOTE_COLUMNS, False),
        **dict.fromkeys(END_COLUMNS, -1),
        "whole_length": 0,
        "outcome": "bad",
        "problem": problem,
    }


def _finish_pair(pair: EncodedPair, max_length: int | None, truncation_mode: TruncationMode) -> dict[str, Any]:
    """Cut the pair to length and say what becomes of it. A pair that nothing can be done with keeps no ids."""
    whole = pair.ids
    cut = whole if max_length is None else truncate_pair(whole, max_length, truncation_mode)
    if not whole.prompt_ids:
        return _bad(
            "prompt_ids: expected at least one token, from which the first answer token is predicted, got none. Use a "
            "tokenizer that adds a BOS token, or a prompt that is not empty and does not merge into the answer."
        )
    if not whole.chosen_ids or not whole.rejected_ids:
        outcome = "empty"
    elif cut is None:
        outcome = "no_room"
    elif whole.chosen_ids == whole.rejected_ids:
        outcome = "identical"
    elif cut.chosen_ids == cut.rejected_ids:
        outcome = "identical_after_truncation"
    else:
        outcome = "kept"
    ids = PairIds([], [], []) if cut is None or outcome == "empty" else cut
    lost = (len(after) < len(before) for after, before in zip(ids, whole, strict=True))
    return {
        **ids._asdict(),
        **dict(zip(CUT_COLUMNS, lost, strict=True)),
        "whole_length": len(whole.prompt_ids) + max(len(whole.chosen_ids), len(whole.rejected_ids)),
        "outcome": outcome,
        "problem": None,
        **{column: getattr(pair, column) for column in (*NOTE_COLUMNS, *END_COLUMNS)},
    }


def as_table(columns: dict[str, list], refs: list[str]) -> pa.Table:
    """The columns of `tokenise_rows` as Arrow."""
    return pa.table(columns, schema=tokenised_features(refs).arrow_schema)
