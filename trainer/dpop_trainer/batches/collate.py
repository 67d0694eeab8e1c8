"""Tokenised pairs -> one batch of CPU tensors, with everything that scoring needs worked out beforehand."""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from dpop_trainer.batches.batch import Batch
from dpop_trainer.batches.layouts import Layout, cheaper_layout, flat_row, packed_rows, padded_rows, tree_rows
from dpop_trainer.data.pair_tree import PairTree
from dpop_trainer.data.pair_weights import WEIGHT_COLUMN
from dpop_trainer.data.records import REF_COLUMNS, REF_SHARED_COLUMN, TOKEN_COLUMNS


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Collates records of `tokenise_pairs` into the tensors of a layout: `padded_rows`, `tree_rows`, `packed_rows` or
    `flat_row`.

    Raises:
        ValueError: an option is out of range.
    """

    pad_token_id: int | None
    """What fills rows up: `tokenizer.pad_token_id`."""
    prefix_sharing: bool = True
    """Score the tokens that both answers begin with once. False scores them in either answer, and in a tree computes
    them in either."""
    pad_to_multiple_of: int | None = None
    """Round the batch's length up to a multiple of this."""
    layout: Layout = "rows"
    """"rows" (two per pair, for any model), "tree" and "packed" (one or more pairs per row, where the model's attention
    takes `trie_mask`), "flat" (one row, for `flat_attention`), or "auto": for each batch the cheapest of the first
    three."""
    hidden_size: int | None = None
    """The model's, for "packed" and "auto" to weigh attention against everything else; None counts positions only."""
    vocab_size: int | None = None
    """If given, every input id must be below it: on a GPU an id outside the vocabulary ends the process."""

    def __post_init__(self):
        if self.pad_token_id is None or self.pad_token_id < 0:
            raise ValueError(
                f"pad_token_id: expected a token id, got {self.pad_token_id}. "
                "Set tokenizer.pad_token, to tokenizer.eos_token if the tokenizer has none."
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: expected at least 1, got {self.pad_to_multiple_of}.")
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout: expected one of {get_args(Layout)}, got {self.layout!r}.")

    def __call__(self, records: list[dict[str, Any]]) -> Batch:
        """
        Args:
            records: B records with prompt_ids, chosen_ids, rejected_ids, pair_id and, in all or none,
                ref_chosen_logps and ref_rejected_logps; with them, in all or none, ref_shared_logps; and weight, 1
                where it is missing.

        Returns:
            The tensors of `padded_rows`, or of `tree_rows` in the other layouts, and
            pair_ids: [B] int64.
            ref_segment_logps: [B, 3] fp32, in nats, if the records carry reference log-probs: the sums of the segments
                that are scored, where the records know the shared part or none is scored apart. Else 0 and the whole
                answers' sums: the loss adds segments up, so these stand for the tails and nothing for the shared part.
            pair_weights: [B] fp32, and weight_sum, their sum, if any record has a weight.

        Raises:
            ValueError: a record lacks a column or a prompt token, a reference log-prob is not finite, or an id lies
                outside the vocabulary; the message names the pair.
        """
        assert self.pad_token_id is not None
        for record in records:
            _check_record(record)
        trees = [
            PairTree.from_ids(*(record[column] for column in TOKEN_COLUMNS), share_prefix=self.prefix_sharing)
            for record in records
        ]
        batch = self._lay_out(trees, self.pad_token_id)
        batch["pair_ids"] = torch.tensor([record["pair_id"] for record in records], dtype=torch.int64)
        if any(column in record for record in records for column in REF_COLUMNS):
            batch["ref_segment_logps"] = _ref_segment_logps(records, self.prefix_sharing)
        batch.update(weights_of(records))
        self._check_vocabulary(batch, records)
        return batch

    def _lay_out(self, trees: list[PairTree], pad_token_id: int) -> Batch:
        layout, multiple = self.layout, self.pad_to_multiple_of
        if layout == "auto":
            layout = cheaper_layout(trees, hidden_size=self.hidden_size, pad_to_multiple_of=multiple)
        if layout == "packed":
            return packed_rows(
                trees, pad_token_id=pad_token_id, pad_to_multiple_of=multiple, hidden_size=self.hidden_size
            )
        lay_out = {"rows": padded_rows, "tree": tree_rows, "flat": flat_row}[layout]
        return lay_out(trees, pad_token_id=pad_token_id, pad_to_multiple_of=multiple)

    def _check_vocabulary(self, batch: Batch, records: list[dict[str, Any]]) -> None:
        input_ids, limit = batch.input_ids, self.vocab_size
        outside = (input_ids < 0) | (input_ids >= limit) if limit is not None else input_ids < 0
        if outside.any():
            token_id = int(input_ids[outside][0])
            holders = [r["pair_id"] for r in records if any(token_id in r[column] for column in TOKEN_COLUMNS)]
            if not holders and batch.trie_ends is None:  # the pad token, in a row of one pair's
                holders = [records[int(outside.nonzero()[0, 0]) % len(records)]["pair_id"]]
            where = f"for pair {holders[0]}" if holders else "as the pad token"
            bound = ">= 0" if limit is None else f"in [0, {limit})"
            raise ValueError(
                f"input_ids: expected ids {bound}, got {token_id} {where}. "
                "Use the model's own tokenizer, and a pad token that the model has an embedding for."
            )


def weights_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """pair_weights [B] fp32 and weight_sum, if any of the records has a weight; 1 for those that have none."""
    if not any(WEIGHT_COLUMN in record for record in records):
        return {}
    weights = torch.tensor([record.get(WEIGHT_COLUMN, 1.0) for record in records], dtype=torch.float32)
    return {"pair_weights": weights, "weight_sum": weights.double().sum().item()}


def _check_record(record: dict[str, Any]) -> None:
    missing = [column for column in (*TOKEN_COLUMNS, "pair_id") if column not in record]
    if missing:
        raise ValueError(
            f"records: expected the columns of tokenise_pairs, got a record without {', '.join(missing)}. "
            "Tokenise the pairs first, and let the data loader keep these columns."
        )
    if not record["prompt_ids"]:
        raise ValueError(
            f"prompt_ids: expected at least one token, got none for pair {record['pair_id']}. "
            "Begin the prompt with a BOS token: the first answer token is predicted from it."
        )


def _ref_segment_logps(records: list[dict[str, Any]], prefix_sharing: bool) -> Tensor:
    for record in records:
        if any(record.get(column) is None for column in REF_COLUMNS):
            raise ValueError(
                f"{', '.join(REF_COLUMNS)}: expected both in every record of a batch or in none, "
                f"got pair {record['pair_id']} without. Compute the reference log-probs of the whole data set."
            )
    whole = torch.tensor([[record[column] for column in REF_COLUMNS] for record in records], dtype=torch.float64)
    shared = torch.zeros(len(records), 1, dtype=torch.float64)
    if prefix_sharing and any(record.get(REF_SHARED_COLUMN) is not None for record in records):
        shared[:, 0] = torch.tensor([_shared_logp(record) for record in records], dtype=torch.float64)
    # fp64 holds the sum of two fp32 numbers that are less than 2^29 apart: a tail is then, bit for bit, what it was
    ref_logps = torch.cat([shared, whole - shared], dim=1).float()
    finite = ref_logps.isfinite().all(-1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"{', '.join(REF_COLUMNS)}: expected finite values, got {whole[first].tolist()} "
            f"for pair {records[first]['pair_id']} ({REF_SHARED_COLUMN}: {shared[first].item():g}). Compute the "
            "reference log-probs again."
        )
    return ref_logps


def _shared_logp(record: dict[str, Any]) -> float:
    value = record.get(REF_SHARED_COLUMN)
    if value is None:
        raise ValueError(
            f"{REF_SHARED_COLUMN}: expected it in every record of a batch or in none, got pair {record['pair_id']} "
            "without. Compute the reference log-probs of the whole data set, or remove the column."
        )
    return value
