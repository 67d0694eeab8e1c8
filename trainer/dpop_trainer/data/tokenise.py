"""Turn a data set of preference pairs into token ids, and count exactly what that changes and drops.

One pass of `Dataset.map`, cached and parallel, writes each pair's ids beside what became of it; the counts are read
from those columns, so they are the same whether the pass ran in one process, in many, or long ago.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from dpop_trainer.data.code_hash import code_hash
from dpop_trainer.data.counts import TokeniseCounts
from dpop_trainer.data.encode import EncodedPair, check_tokenizer, encode_records
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import (
    REF_COLUMNS,
    TOKEN_COLUMNS,
    Form,
    check_pairs,
    raise_problems,
    used_columns,
)
from dpop_trainer.data.sound_cache import map_or_map_anew
from dpop_trainer.data.truncate import TruncationMode, check_truncation, truncate_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

_CUT_COLUMNS = ("prompt_cut", "chosen_cut", "rejected_cut")


def tokenise_pairs(
    dataset: Dataset,
    processing_class: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    keep_identical: bool = False,
    vocab_size: int | None = None,
) -> tuple[Dataset, TokeniseCounts]:
    """Tokenise pairs, cut them to length, and drop those that hold no preference.

    Text: special tokens at the beginning are the tokenizer's own; any that it appends are left out, and each answer
    ends with exactly one EOS.

    Messages: the chat template renders prompt and answers, and alone decides how a turn ends. The columns `tools`
    (a list or its JSON) and `chat_template_kwargs` go to the template.

    Token ids: taken as they are.

    Args:
        dataset: pairs as text, messages or token ids, see `records`.
        processing_class: the model's tokenizer.
        max_length: most tokens of prompt + answer, for each answer. None: no limit.
        truncation_mode: which end of a longer pair is kept, see `truncate_pair`.
        num_proc: processes that tokenise. None: this one.
        keep_identical: keep pairs whose two answers have the same tokens (their margin is always 0).
        vocab_size: if given, every id must be below it.

    Returns:
        The data set with the columns prompt_ids, chosen_ids, rejected_ids (whole answers), pair_id (the pair's row
        in `dataset`) and, if `dataset` has them, ref_chosen_logps and ref_rejected_logps; and the counts.

    Raises:
        ValueError: records cannot be used (see `check_pairs`), the tokenizer has no EOS token or no chat template
            where one is needed, a prompt has no tokens, an id lies outside the vocabulary, a pair with
            reference log-probs would be cut, or no pair is left.
    """
    check_truncation(max_length, truncation_mode)
    form = check_pairs(dataset)
    check_tokenizer(processing_class, form)
    refs = [column for column in REF_COLUMNS if column in dataset.column_names]
    source = dataset.with_format(None).select_columns(used_columns(dataset))
    mapped = map_or_map_anew(
        source,
        _tokenise_batch,
        with_indices=True,
        batched=True,
        fn_kwargs={
            "form": form,
            "tokenizer": processing_class,
            "max_length": max_length,
            "truncation_mode": truncation_mode,
            "code": code_hash(),
        },
        remove_columns=source.column_names,
        features=Features(
            {column: List(Value("int32")) for column in TOKEN_COLUMNS}
            | {"pair_id": Value("int64"), "outcome": Value("string"), "prompt_shortened": Value("bool")}
            | {column: Value("bool") for column in _CUT_COLUMNS}
            | {column: Value("float64") for column in refs}
        ),
        num_proc=num_proc,
        desc="Tokenising pairs",
    )
    table = mapped.with_format("arrow")[:]
    identical = ("identical", "identical_after_truncation") if keep_identical else ()
    kept = np.isin(table["outcome"].to_pylist(), ["kept", *identical])
    _check_prompts(table)
    _check_vocabulary(table, vocab_size)
    if refs:
        _check_refs(table, kept)
    counts = _count(table, kept, keep_identical=keep_identical)
    if not counts.num_pairs:
        raise ValueError(
            f"dataset: expected at least one pair to train on, got none. {counts.summary()} "
            "Raise max_length if prompts leave no room, or look at the answers if they are identical."
        )
    if not kept.all():
        mapped = mapped.select(np.flatnonzero(kept))
    _logger.info(counts.summary())
    return mapped.select_columns([*TOKEN_COLUMNS, "pair_id", *refs]), counts


def _tokenise_batch(
    batch: dict[str, list],
    indices: list[int],
    *,
    form: Form,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    truncation_mode: TruncationMode,
    code: str,  # read by nobody, but part of the cache key
) -> dict[str, list]:
    records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs = encode_records(records, indices, form=form, tokenizer=tokenizer)
    rows = [_finish_pair(pair, max_length, truncation_mode) for pair in pairs]
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    refs = {column: batch[column] for column in REF_COLUMNS if column in batch}
    return {**columns, **refs, "pair_id": indices}


def _finish_pair(pair: EncodedPair, max_length: int | None, truncation_mode: TruncationMode) -> dict[str, Any]:
    """Cut the pair to length and say what becomes of it. A pair that nothing can be done with keeps no ids."""
    whole = pair.ids
    cut = whole if max_length is None else truncate_pair(whole, max_length, truncation_mode)
    if not whole.prompt_ids:
        outcome = "no_prompt"
    elif not whole.chosen_ids or not whole.rejected_ids:
        outcome = "empty"
    elif cut is None:
        outcome = "no_room"
    elif whole.chosen_ids == whole.rejected_ids:
        outcome = "identical"
    elif cut.chosen_ids == cut.rejected_ids:
        outcome = "identical_after_truncation"
    else:
        outcome = "kept"
    ids = PairIds([], [], []) if cut is None or outcome in ("no_prompt", "empty") else cut
    lost = (len(after) < len(before) for after, before in zip(ids, whole, strict=True))
    return {
        **ids._asdict(),
        **dict(zip(_CUT_COLUMNS, lost, strict=True)),
        "outcome": outcome,
        "prompt_shortened": pair.prompt_shortened,
    }


def _check_prompts(table: pa.Table) -> None:
    problem = (
        "prompt_ids: expected at least one token, from which the first answer token is predicted, got none. Use a "
        "tokenizer that adds a BOS token, or a prompt that is not empty and does not merge into the answer."
    )
    outcomes = table["outcome"].to_pylist()
    raise_problems("prompts", len(outcomes), (problem if outcome == "no_prompt" else None for outcome in outcomes))


def _check_refs(table: pa.Table, kept: np.ndarray) -> None:
    problem = (
        "ref_chosen_logps: expected a pair that fits max_length, got one that is cut, so the reference log-probs are "
        "not those of its tokens. Raise max_length, or remove the two columns to compute them again."
    )
    is_cut = np.any([table[column].to_pylist() for column in _CUT_COLUMNS], axis=0) & kept
    raise_problems("reference log-probs", len(kept), (problem if cut else None for cut in is_cut))


def _check_vocabulary(table: pa.Table, vocab_size: int | None) -> None:
    bound = ">= 0" if vocab_size is None else f"in [0, {vocab_size})"

    def problem(column: str, ids: list[int]) -> str | None:
        outside = [i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)]
        if not outside:
            return None
        return f"{column}: expected ids {bound}, got {outside[0]}. Use the tokenizer of the model that is trained."

    for column in TOKEN_COLUMNS:
        limits = pc.min_max(pc.list_flatten(table[column])).as_py()
        if limits["min"] is None:  # no ids at all
            continue
        # only a column that holds a bad id is looked at row by row
        if problem(column, [limits["min"], limits["max"]]):
            raise_problems("token ids", len(table), (problem(column, ids.as_py()) for ids in table[column]))


def _count(table: pa.Table, kept: np.ndarray, *, keep_identical: bool) -> TokeniseCounts:
    outcomes = Counter(table["outcome"].to_pylist())
    mask = pa.array(kept)

    def total(values: Any) -> int:
        return pc.sum(pc.filter(values, mask), min_count=0).as_py()

    return TokeniseCounts(
        num_pairs_in=len(kept),
        num_pairs=int(kept.sum()),
        dropped_empty=outcomes["empty"],
        dropped_no_room=outcomes["no_room"],
        dropped_identical=0 if keep_identical else outcomes["identical"],
        dropped_identical_after_truncation=0 if keep_identical else outcomes["identical_after_truncation"],
        truncated_prompts=total(table["prompt_cut"]),
        truncated_chosen=total(table["chosen_cut"]),
        truncated_rejected=total(table["rejected_cut"]),
        merged_boundaries=total(table["prompt_shortened"]),
        prompt_tokens=total(pc.list_value_length(table["prompt_ids"])),
        chosen_tokens=total(pc.list_value_length(table["chosen_ids"])),
        rejected_tokens=total(pc.list_value_length(table["rejected_ids"])),
    )
