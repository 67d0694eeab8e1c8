"""Ranks that run every batch together, each some of its columns: sequence parallelism, after DeepSpeed's Ulysses.

Source: Jacobs et al. 2023, arXiv:2309.14509. Between attentions a rank has T / P neighbouring columns of every row,
with all heads; in an attention all columns, with 1 / P of the heads. So an attention is whole, whatever its mask. What
is scored is joined where a batch's log-probs meet: each rank computes those of its own columns, and all have all.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable


class SequenceGroup(NamedTuple):
    """The ranks that run this process's batches together."""

    process_group: Any
    rank: int
    """This process's place among them: it has the rank-th part of the columns."""
    size: int

    def columns(self, num_columns: int) -> slice:
        """This rank's of so many columns, a multiple of the ranks."""
        own = num_columns // self.size
        return slice(self.rank * own, (self.rank + 1) * own)


def join_group(size: int) -> SequenceGroup | None:
    """The group of `size` neighbouring ranks that this process belongs to; None where each runs its batches alone.

    All processes call it together. Their number is a multiple of `size`.
    """
    if size == 1:
        return None
    process_group, _ = dist.new_subgroups(group_size=size)
    return SequenceGroup(process_group, dist.get_rank() % size, size)


def to_heads(states: Tensor, group: SequenceGroup) -> Tensor:
    """Of this rank's columns all heads -> of all columns this rank's heads, differentiable.

    Args:
        states: [R, heads, T / P, D], heads a multiple of P.
        group: of P ranks.

    Returns:
        [R, heads / P, T, D].
    """
    num_rows, num_heads, num_columns, size = states.shape
    by_rank = states.reshape(num_rows, group.size, num_heads // group.size, num_columns, size).transpose(0, 1)
    received = _AllToAll.apply(by_rank, group.process_group)  # [P, R, heads / P, T / P, D]
    return received.permute(1, 2, 0, 3, 4).reshape(num_rows, num_heads // group.size, -1, size)


def to_columns(states: Tensor, group: SequenceGroup) -> Tensor:
    """The way back, in the order that an attention returns: [R, T, heads / P, D] -> [R, T / P, heads, D]."""
    num_rows, num_columns, num_heads, size = states.shape
    by_rank = states.reshape(num_rows, group.size, num_columns // group.size, num_heads, size).transpose(0, 1)
    received = _AllToAll.apply(by_rank, group.process_group)  # [P, R, T / P, heads / P, D]
    return received.permute(1, 2, 0, 3, 4).reshape(num_rows, num_columns // group.size, -1, size)


def joined(values: Tensor, own_tokens: Tensor, num_tokens: int, group: SequenceGroup) -> Tensor:
    """Each rank's values of its own tokens -> all tokens' on every rank, to the bit those that were computed.

    Every rank goes on to compute the same loss from them, and data parallelism takes the mean of all ranks' gradients.
    The gradient of that mean is P times a rank's own, and goes to the rank whose token it is.

    Args:
        values: [K, N_rank], differentiable.
        own_tokens: [N_rank] int64, which of the N tokens they are of. Every token is one rank's.
        num_tokens: N.
        group: of P ranks.

    Returns:
        [K, N].
    """
    return _Joined.apply(values, own_tokens, num_tokens, group)


class _AllToAll(torch.autograd.Function):
    """[P, ...]: part i goes to rank i of the group, and part j of the result came from rank j. Its own transpose."""

    @staticmethod
    def forward(ctx, parts, process_group):
        ctx.process_group = process_group
        return exchanged(parts, process_group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return exchanged(grad, ctx.process_group), None


def exchanged(parts: Tensor, process_group: Any) -> Tensor:
    """[P, ...] -> what the ranks have for this one, in their order."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=process_group)
    return received


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, own_tokens, num_tokens, group):
        ctx.save_for_backward(own_tokens)
        ctx.size = group.size
        together = values.new_zeros(values.shape[0], num_tokens).index_copy_(1, own_tokens, values)
        dist.all_reduce(together, group=group.process_group)  # zeros but for one rank's value
        return together

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (own_tokens,) = ctx.saved_tensors
        return ctx.size * grad.index_select(1, own_tokens), None, None, None
