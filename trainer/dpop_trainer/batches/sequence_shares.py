"""A batch that several ranks run together: whose its scored tokens are, and all log-probs from each one's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpop_kernels import ScoringHead, TokenStats
from dpop_trainer.batches.batch import Batch, as_batch
from dpop_trainer.batches.sequence_group import SequenceGroup, joined
from dpop_trainer.batches.shared_attention import SharedForward, run_together


def share_out(batch: Batch, group: SequenceGroup) -> Batch:
    """The batch with `own_tokens`, the scored tokens whose predictors stand in this rank's columns, and `pads_right`;
    on the CPU, so that nothing waits for the device. So too a batch inside of it.

    Raises:
        ValueError: its rows are no multiple of the group's size.
    """
    num_columns = batch.input_ids.shape[1]
    if num_columns % group.size:
        raise ValueError(
            f"data_collator: expected rows of a multiple of sequence_parallel_size {group.size}, got {num_columns} "
            f"columns. Fill them up to {num_columns + -num_columns % group.size}."
        )
    owner = batch.score_positions % num_columns // (num_columns // group.size)
    inside = {key: share_out(value, group) for key, value in batch.items() if isinstance(value, Batch)}
    own_tokens = (owner == group.rank).nonzero().flatten()
    pads_right = bool((batch.attention_mask.diff(dim=1) <= 0).all())
    return Batch({**batch, **inside, "own_tokens": own_tokens, "pads_right": pads_right})


def to_run_together(batch: Batch, group: SequenceGroup) -> Batch:
    """A batch that is shared out, marked so that scoring runs it with the others of the group."""
    inside = {key: to_run_together(value, group) for key, value in batch.items() if isinstance(value, Batch)}
    return Batch({**batch, **inside, "sequence_group": group})


class SharedCollator:
    """A collator whose batches are shared out to the ranks of a group.

    Args:
        collate: makes them, the same on each of the ranks.
        group: a rank's place in it; its process group stays with this process.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any], group: SequenceGroup) -> None:
        self._collate, self._place = collate, group._replace(process_group=None)

    def __call__(self, records: list[dict[str, Any]]) -> Batch:
        return share_out(as_batch(self._collate(records)), self._place)


def shared_token_logps(
    head: ScoringHead, model: Any, batch: Batch, inputs: dict[str, Any], *, return_stats: bool = False
) -> Any:
    """`ScoringHead.token_logps` of a batch that is run together: every rank of the group calls it, and gets all of it.

    Args:
        head: of the model.
        model: its attention is shared, see `share_attention`.
        batch: marked by `to_run_together`.
        inputs: from `forward_inputs`, of all columns.
        return_stats: see `ScoringHead.token_logps`.

    Raises:
        RuntimeError: the model's layers did not ask for the mask that tells them to exchange columns.
    """
    group, own_tokens = batch.sequence_group, batch.own_tokens
    assert group is not None
    assert own_tokens is not None
    num_columns = batch.input_ids.shape[1]
    columns = group.columns(num_columns)
    predictors = batch.score_positions.index_select(0, own_tokens)
    rows = predictors // num_columns
    mask = None if batch.trie_ends is None else inputs["attention_mask"]
    forward = SharedForward(group, batch.attention_mask, pads_right=batch.pads_right, mask=mask)
    with run_together(forward):
        scored = head.token_logps(
            model,
            rows * (columns.stop - columns.start) + predictors % num_columns - columns.start,
            batch.target_ids.index_select(0, own_tokens),
            return_stats=return_stats,
            **{**inputs, **of_columns(batch, columns)},
        )
    if not forward.num_exchanges:
        raise RuntimeError(
            f"{type(model).__name__}: expected attentions that exchange columns with the other ranks, got none. Call "
            "share_attention on the model before."
        )
    num_tokens = batch.target_ids.shape[0]
    if not return_stats:
        return joined(scored.unsqueeze(0), own_tokens, num_tokens, group)[0]
    logps, stats = scored
    own = torch.stack([logps, *(value.to(logps.dtype) for value in stats)])
    logps, *values = joined(own, own_tokens, num_tokens, group)
    whole = TokenStats(*(value.detach().to(one.dtype) for value, one in zip(values, stats, strict=True)))
    return logps, whole


def of_all_columns(states: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
    """What layers give of this rank's columns, joined on every rank as `joined` does, gradient and all.

    Args:
        states: [R * T / P, K] of each layer, row after row.
        batch: marked by `to_run_together`.

    Returns:
        [R * T, K] of each layer.
    """
    group = batch.sequence_group
    assert group is not None
    places = torch.arange(batch.input_ids.numel(), device=states[0].device).view_as(batch.input_ids)
    own = places[:, group.columns(batch.input_ids.shape[1])].flatten()
    together = joined(torch.cat([state.T for state in states]), own, places.numel(), group)
    return tuple(part.T for part in together.split([state.shape[1] for state in states]))


def of_columns(batch: Batch, columns: slice) -> dict[str, Tensor]:
    """What the model is given of the columns. Their positions count from the beginning of the whole row."""
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(batch.input_ids)
    return {
        "input_ids": batch.input_ids[:, columns],
        "attention_mask": batch.attention_mask[:, columns],
        "position_ids": positions[:, columns],
    }
