"""Attention of flat rows on paper: which columns see which is read from the batch beforehand, not from a mask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpop_trainer.batches.flat_attention import Run, attend_by_runs
from dpop_trainer.batches.shared_attention import register_shared
from dpop_trainer.tools.plan.tape import add_flop

PAPER_ATTENTION = "dpop_flat_on_paper"
"""The name in `config._attn_implementation`."""

_ROWS: list[tuple[list[Run], bool]] = []
"""The row that is under way: its runs, and whether FlexAttention is stood in for."""


@contextmanager
def flat_row_on_paper(found: list[Run], *, on_gpu: bool) -> Iterator[None]:
    """Inside, `PAPER_ATTENTION` is the attention of this flat row; given any other mask it is sdpa.

    Args:
        found: from `flat_attention.runs`.
        on_gpu: FlexAttention's allocations; else the calls of sdpa that a CPU makes.
    """
    _ROWS.append((found, on_gpu))
    try:
        yield
    finally:
        _ROWS.pop()


def num_seen(found: list[Run]) -> int:
    """Pairs of positions of which one sees the other, itself included."""
    return sum(
        run.length * (run.length + 1) // 2 + run.length * sum(count for _, count in run.beginning) for run in found
    )


class _SeenAttention(torch.autograd.Function):
    """FlexAttention's allocations: the output and its log-sum-exp are kept, scores never are."""

    @staticmethod
    def forward(ctx, query, key, value, flop):
        output = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.flop = flop
        add_flop("attention", flop)
        return output

    @staticmethod
    def backward(ctx, *grads):
        query, key, value, _, _ = ctx.saved_tensors
        add_flop("attention", 2.5 * ctx.flop)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def paper_attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention function -> ([R, T, heads, D], nothing)."""
    if not _ROWS or attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    found, on_gpu = _ROWS[-1]
    if not on_gpu:
        kwargs.pop("is_causal", None)
        return attend_by_runs(module, query, key, value, found, **kwargs), None
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    flop = 4.0 * num_seen(found) * query.shape[0] * query.shape[1] * query.shape[-1]
    output: Any = _SeenAttention.apply(query, key, value, flop)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(PAPER_ATTENTION, paper_attention_forward)
AttentionMaskInterface.register(PAPER_ATTENTION, sdpa_mask)
register_shared(PAPER_ATTENTION, "dpop_shared_on_paper", paper_attention_forward)
