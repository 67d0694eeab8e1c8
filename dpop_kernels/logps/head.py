"""The head as one value: all that stands between hidden states and logits.

u = h Wᵀ + a Bᵀ + bias                               raw logits [N, V]
z = softcap · tanh(scale · u / softcap)              logits; either transform may be absent
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """logits = softcap · tanh(scale · u / softcap) for the raw logits u; without softcap, scale · u."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, raw_logits: Tensor) -> Tensor:
        """z of u; u itself where there is nothing to do."""
        if self.softcap is not None:
            return torch.tanh(raw_logits * (self.scale / self.softcap)).mul_(self.softcap)
        return raw_logits if self.scale == 1.0 else raw_logits * self.scale

    def times_slope(self, grads: Tensor, z: Tensor) -> Tensor:
        """grads · dz/du, in place: dz/du = scale · (1 - (z / softcap)²)."""
        if self.softcap is not None:
            grads.mul_((z / self.softcap).square_().neg_().add_(1.0))
        return grads if self.scale == 1.0 else grads.mul_(self.scale)


PLAIN = LogitTransform()


class Adapter(NamedTuple):
    """A low-rank addition to the weight: W + B A, of which the states a = h Aᵀ are given."""

    states: Tensor
    """a [N, R], any floating dtype."""
    weight: Tensor
    """B [V, R], any floating dtype."""


class Shard(NamedTuple):
    """Which rows of the whole head these are, where ranks hold it between them."""

    vocab_start: int
    process_group: Any
    sum_grad_hidden: bool = True
    """Sum the gradients of h and a over the ranks in backward."""


class Head(NamedTuple):
    """What travels from the public functions to the tiles."""

    weight: Tensor
    """W [V, H], in the hidden states' dtype."""
    bias: Tensor | None = None
    """[V]"""
    transform: LogitTransform = PLAIN
    adapter: Adapter | None = None
    shard: Shard | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, the adapter's states and weight: what may have a gradient."""
        return self.weight, self.bias, *(self.adapter or (None, None))

    def with_tensors(self, *tensors: Tensor | None) -> "Head":
        """The counterpart of `tensors`."""
        weight, bias, states, low_rank_weight = tensors
        assert weight is not None, "a head has a weight"
        adapter = None if states is None or low_rank_weight is None else Adapter(states, low_rank_weight)
        return self._replace(weight=weight, bias=bias, adapter=adapter)

    def rows(self, rows: slice) -> "Head":
        """As these rows of the hidden states see it."""
        adapter = self.adapter and self.adapter._replace(states=self.adapter.states[rows])
        return self._replace(adapter=adapter)

    def columns(self, columns: slice, dtype: torch.dtype) -> "Head":
        """This block of the vocabulary; its weight in the dtype that products take."""
        adapter = self.adapter and self.adapter._replace(weight=self.adapter.weight[columns])
        bias = None if self.bias is None else self.bias[columns]
        return self._replace(weight=self.weight[columns].to(dtype), bias=bias, adapter=adapter)
