"""A collator that a script passes in: it returns a `Batch`'s keys, or the rows of TRL's `DataCollatorForPreference`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpop_trainer.batches.batch import Batch
from dpop_trainer.batches.collate import weights_of

_BATCH_KEYS = ("input_ids", "attention_mask", "score_positions", "target_ids", "cu_seqlens", "pair_ids", "token_counts")
_ROW_KEYS = ("input_ids", "attention_mask", "completion_mask")
_REF_KEYS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class OwnCollator:
    """Makes a `Batch` of what another collator returns."""

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    def __call__(self, records: list[dict[str, Any]]) -> Batch:
        """
        Raises:
            ValueError: what is returned are neither a batch's keys nor rows of chosen and rejected answers, or more
                than those.
        """
        collated = self.collator(records)
        if collated.keys() >= set(_BATCH_KEYS):
            return Batch({**weights_of(records), **collated})
        if not set(_ROW_KEYS) <= collated.keys() <= {*_ROW_KEYS, *_REF_KEYS}:
            raise ValueError(
                f"data_collator: expected it to return the keys {', '.join(_BATCH_KEYS)} of PairCollator, or those of "
                f"TRL's DataCollatorForPreference ({', '.join(_ROW_KEYS)}, and where known {', '.join(_REF_KEYS)}), "
                f"got {', '.join(collated)}. Leave it out, or return either."
            )
        if len(collated["input_ids"]) != 2 * len(records):
            raise ValueError(
                f"data_collator: expected a row for each answer of {len(records)} pairs, the chosen ones first, got "
                f"{len(collated['input_ids'])} rows."
            )
        batch = batch_of_rows(collated, torch.tensor([record["pair_id"] for record in records]))
        return Batch({**batch, **weights_of(records)})


def batch_of_rows(collated: Mapping[str, Tensor], pair_ids: Tensor) -> Batch:
    """Rows of B chosen and then B rejected answers, each scored whole in its own row.

    Args:
        collated: input_ids, attention_mask, completion_mask [2B, T], and perhaps ref_chosen_logps and
            ref_rejected_logps [B]. A row's first token is not scored: nothing predicts it.
        pair_ids: [B] int64.
    """
    input_ids, mask = collated["input_ids"], collated["completion_mask"].bool()
    num_pairs, length = len(pair_ids), input_ids.shape[1]
    by_pair = torch.arange(2 * num_pairs).view(2, num_pairs).T.reshape(-1)  # chosen 0, rejected 0, chosen 1, ...
    scored = mask[by_pair, 1:]
    row, column = scored.nonzero(as_tuple=True)
    positions = by_pair[row] * length + column
    lengths = pad(scored.sum(1).view(num_pairs, 2), (1, 0))  # no segment is shared
    num_tokens = collated["attention_mask"].sum()
    batch = Batch(
        input_ids=input_ids,
        attention_mask=collated["attention_mask"],
        score_positions=positions,
        target_ids=input_ids.reshape(-1)[positions + 1],
        cu_seqlens=pad(lengths.view(-1).cumsum(0), (1, 0)).int(),
        pair_ids=pair_ids,
        token_counts=torch.stack([num_tokens, num_tokens]),
    )
    if "ref_chosen_logps" in collated:
        chosen, rejected = (torch.as_tensor(collated[key], dtype=torch.float32) for key in _REF_KEYS)
        batch["ref_segment_logps"] = torch.stack([torch.zeros_like(chosen), chosen, rejected], dim=1)
    return batch
