"""FlashAttention on paper, installed or not: its allocations, and the pairs of positions that it sees."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from dpop_trainer.tools.plan.tape import add_flop

FLASH_ON_PAPER = "dpop_fa_on_paper"
"""The name in `config._attn_implementation`."""


def attention_on_paper(attention: str | None) -> str | None:
    """What stands for an attn_implementation; FlashAttention's, from a package or from a hub's kernels, need a GPU."""
    return FLASH_ON_PAPER if attention is not None and "flash" in attention else attention


def num_seen(length: int, window: int | None) -> int:
    """Pairs of positions in a row of which one sees the other, itself included."""
    width = length if window is None else min(window, length)
    return width * length - width * (width - 1) // 2


class _FlashAttention(torch.autograd.Function):
    """The output and its log-sum-exp are kept, scores and masks never are. In the backward the query's gradient is
    summed in fp32, and every head has gradients of its own of the keys and values that several share."""

    @staticmethod
    def forward(ctx, query, key, value, flop):
        num_rows, num_heads, length, width = query.shape
        output = query.new_empty(num_rows, length, num_heads, width)
        logsumexp = query.new_empty(num_rows, num_heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.flop = flop
        add_flop("attention", flop)
        return output

    @staticmethod
    def backward(ctx, *grads):
        query, key, value, _, logsumexp = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32), torch.empty_like(logsumexp)
        of_heads = [torch.empty_like(query) for _ in range(2)] if key.shape != query.shape else []
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, of_heads
        add_flop("attention", 2.5 * ctx.flop)
        return *found, None


def flash_attention_on_paper(
    module: torch.nn.Module,
    query: Tensor,  # [R, heads, T, D]
    key: Tensor,  # [R, key heads, T, D]
    value: Tensor,
    attention_mask: Any,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function -> ([R, T, heads, D], nothing)."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    num_rows, num_heads, length, width = query.shape
    flop = 4.0 * num_seen(length, sliding_window) * num_rows * num_heads * width
    return _FlashAttention.apply(query, key, value, flop), None  # type: ignore[return-value]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """It is told of padding by lengths."""


AttentionInterface.register(FLASH_ON_PAPER, flash_attention_on_paper)
AttentionMaskInterface.register(FLASH_ON_PAPER, _no_mask)
