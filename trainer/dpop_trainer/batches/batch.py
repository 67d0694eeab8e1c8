"""Batch: what a collator makes, and all that comes after it reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpop_trainer.batches.sequence_group import SequenceGroup

FILLER_KEY = "is_filler"

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
_ABSENT: dict[str, Any] = {
    "position_ids": None,
    "trie_ends": None,
    "num_sequences": None,
    "ref_segment_logps": None,
    "pair_weights": None,
    "weight_sum": None,
    FILLER_KEY: False,
    "own_tokens": None,
    "pads_right": False,
    "sequence_group": None,
}


class Batch(dict[str, Any]):
    """A collated batch: N scored tokens of B pairs (or completions) in R rows of T positions.

    Read by its fields. It is a dict as well: loaders, accelerate and transformers pin, place and rebuild dicts, and
    nothing else that all of them know has names.
    """

    input_ids: Tensor
    """[R, T] int64."""
    attention_mask: Tensor
    """[R, T] int64, 1 for tokens and 0 for padding. Where there are `trie_ends`, not enough for the model."""
    score_positions: Tensor
    """[N] int64, for each scored token the position that predicts it, into hidden states [R, T, H] as [R * T, H]."""
    target_ids: Tensor
    """[N] int64, the scored tokens."""
    cu_seqlens: Tensor
    """int32, where each segment begins and ends among the scored tokens: [3B + 1] of pairs (shared, chosen tail,
    rejected tail), [B + 1] of completions."""
    pair_ids: Tensor
    """[B] int64."""
    token_counts: Tensor
    """[2] int64, of pairs: tokens of both whole sequences of every pair, tokens in the rows. Neither counts padding."""
    position_ids: Tensor | None
    """[R, T] int64; None where a row's tokens are at the positions 0, 1, 2, ..."""
    trie_ends: Tensor | None
    """[R, T] int64: the first column after each from which on it is not seen; None where a row is one sequence."""
    num_sequences: Tensor | None
    """[R, T] int64, how many of the pairs' sequences go through each position, 0 for padding; beside `trie_ends`."""
    ref_segment_logps: Tensor | None
    """[B, 3] fp32, in nats, where the data bring the reference's log-probs."""
    pair_weights: Tensor | None
    """[B] fp32, what each pair counts in the loss; None where each counts 1."""
    weight_sum: float | None
    """Their sum, known without asking the device."""
    is_filler: bool
    """Its pairs are there to keep a rank in step, and count for nothing."""
    own_tokens: Tensor | None
    """[N_rank] int64, which of the scored tokens this rank computes, where several run the batch together."""
    pads_right: bool
    """With `own_tokens`: known to have all padding behind the tokens of its row."""
    sequence_group: SequenceGroup | None
    """Those ranks, once the batch is about to be run; None where this one runs it alone."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in _ABSENT:
            return _ABSENT[name]
        if name in type(self).__annotations__:
            raise AttributeError(f"{name}: expected it in the batch, got {', '.join(self)}. A collator returns it.")
        raise AttributeError(name)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on a device."""
        return Batch(
            {
                key: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor | Batch) else value
                for key, value in self.items()
            }
        )

    def model_inputs(self, attention_mask: Any = None) -> dict[str, Any]:
        """What a model's forward takes.

        Args:
            attention_mask: in place of the batch's own, which tells padding alone: needed where there are `trie_ends`.
        """
        assert attention_mask is not None or self.trie_ends is None, "rows of tries need the mask that their ends say"
        inputs = {key: self[key] for key in _MODEL_INPUTS if key in self}
        return inputs if attention_mask is None else {**inputs, "attention_mask": attention_mask}


def as_batch(collated: Mapping[str, Any]) -> Batch:
    """A collator's result; of the user's own collators a mapping with the same keys."""
    return collated if isinstance(collated, Batch) else Batch(collated)
