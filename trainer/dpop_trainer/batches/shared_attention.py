"""Attention of a batch whose columns are spread over ranks: around the layout's own attention, heads for columns.

The way is told by the mask. While a batch is run together, the mask that a model asks for is a `SharedMask`: it goes
through the layers as any other does, also where one is computed again in backward, and says that columns are to be
exchanged and what is seen among all of them. Under any other mask, or none, the attention is what it was.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dpop_trainer.batches.flat_attention import FLAT_ATTENTION, flat_attention_forward
from dpop_trainer.batches.sequence_group import SequenceGroup, to_columns, to_heads

_SHARED: dict[str, str] = {}
"""Attentions that can be shared, and their names in `config._attn_implementation` when they are."""
_INNER: dict[str, str] = {}


@dataclass
class SharedForward:
    """A forward that the ranks of a group run together."""

    group: SequenceGroup
    attention_mask: Tensor
    """[R, T] of all columns, 1 for tokens and 0 for padding."""
    pads_right: bool = False
    """No token comes after padding: what sees nothing behind itself sees none."""
    mask: Any = None
    """What all columns see, where the layout says so itself; None where the model's kind of layer does."""
    num_exchanges: int = 0
    """Attentions that have run together."""


@dataclass(frozen=True)
class SharedMask:
    """Stands for the mask of a layer. No tensor: nothing that casts or moves a layer's inputs looks into it."""

    forward: SharedForward
    mask: Any
    """What the attention inside takes, of all columns."""


_under_way: ContextVar[SharedForward | None] = ContextVar("_under_way", default=None)


@contextmanager
def run_together(forward: SharedForward) -> Iterator[None]:
    """The model's forward inside is one of columns that are spread over the group."""
    token = _under_way.set(forward)
    try:
        yield
    finally:
        _under_way.reset(token)


def inner_attention(name: str) -> str:
    """The attention that runs between the exchanges, or the one that is not shared."""
    return _INNER.get(name, name)


def share_attention(model: Any) -> None:
    """Let a model run its batches together with other ranks; alone it runs as before.

    Args:
        model: a causal LM, without an adapter's wrapper, whose attention is sdpa or the flat layout's.

    Raises:
        ValueError: it has another attention, or its code does not look it up where transformers' interface puts it.
    """
    name = inner_attention(model.config.get_text_config()._attn_implementation)
    if name not in _SHARED:
        raise ValueError(
            f"sequence_parallel_size: expected attn_implementation 'sdpa' beside it, got {name!r}. Load the model with "
            "'sdpa', or set sequence_parallel_size to 1."
        )
    model.set_attn_implementation(_SHARED[name])
    if model.config.get_text_config()._attn_implementation != _SHARED[name]:
        raise ValueError(
            f"sequence_parallel_size: expected a model that takes an attention function of transformers' interface, "
            f"got {model.config.model_type}. Set it to 1."
        )


def register_shared(inner: str, shared: str, attend: Callable[..., Any]) -> None:
    """Make an attention one that can be shared.

    Args:
        inner: its name in `config._attn_implementation`.
        shared: and when it is shared.
        attend: it, by transformers' interface.
    """
    _SHARED[inner], _INNER[shared] = shared, inner
    AttentionInterface.register(shared, _shared_attention(attend))
    AttentionMaskInterface.register(shared, _shared_mask)


def _shared_attention(attend: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module,
        query: Tensor,  # [R, heads, T / P, D] where the batch is run together, else [R, heads, T, D]
        key: Tensor,  # [R, key heads, ..., D]
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, SharedMask):
            return attend(module, query, key, value, attention_mask, **kwargs)
        attention_mask.forward.num_exchanges += 1
        group = attention_mask.forward.group
        # a rank with fewer than one of the key heads has one that others have as well
        repeats = math.lcm(key.shape[1], group.size) // key.shape[1]
        if torch.is_autocast_enabled(query.device.type):  # half as much to send of rotated queries, which are in fp32
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        key, value = (states.repeat_interleave(repeats, dim=1) if repeats > 1 else states for states in (key, value))
        query, key, value = (to_heads(states, group) for states in (query, key, value))
        inner = _WithGroups(module, query.shape[1] // key.shape[1])
        output, _ = attend(inner, query, key, value, attention_mask.mask, **kwargs)
        return to_columns(output, group), None

    return forward


class _WithGroups:
    """A layer's attention module as its attention function reads it, with this rank's query heads per key head."""

    def __init__(self, module: nn.Module, num_key_value_groups: int) -> None:
        self._module, self.num_key_value_groups = module, num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _shared_mask(**asked: Any) -> Any:
    """transformers' interface of a mask function. It is asked for the mask of the columns that the model was given."""
    forward = _under_way.get()
    if forward is None:
        return sdpa_mask(**asked)
    if forward.mask is not None:
        return SharedMask(forward, forward.mask)
    if forward.pads_right and asked["mask_function"] is causal_mask_function:
        return SharedMask(
            forward, None
        )  # sdpa's own causal attention: rows that are worth spreading have no room for T²
    num_columns = forward.attention_mask.shape[1]
    asked |= {"q_length": num_columns, "kv_length": num_columns, "q_offset": 0, "kv_offset": 0}
    asked["attention_mask"] = forward.attention_mask.bool()
    return SharedMask(forward, sdpa_mask(**asked))


register_shared("sdpa", "dpop_shared_sdpa", sdpa_attention_forward)
register_shared(FLAT_ATTENTION, "dpop_shared_flat", flat_attention_forward)
