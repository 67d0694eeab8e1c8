"""Attention that is counted, not computed: what a kernel without scores in memory keeps, and the pairs that are seen.

Every side gets the same one, and each the best of its mask: a query and a key that do not see each other cost nothing,
as if no block of a mask had a rest. So what is counted is the least that any kernel takes.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from benchmarks.counted.shapes_only import ShapesOnly

COUNTED = "counted"
"""Its name in `config._attn_implementation`."""
ATTENTION = "attention"
"""Its phase."""


def use_counted_attention(model: Any, counter: ShapesOnly) -> None:
    """Have a model attend under a counter."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return _Attend.apply(query, key, value, seen_pairs(query, attention_mask), counter), None

    AttentionInterface.register(COUNTED, attend)
    AttentionMaskInterface.register(COUNTED, sdpa_mask)
    model.set_attn_implementation(COUNTED)


def seen_pairs(query: Tensor, attention_mask: Tensor | None) -> int:
    """Pairs of a query and a key that see each other, in all rows of one head.

    Args:
        query: [R, heads, T, D].
        attention_mask: [R or 1, 1, T, T] bool, with data; None is a causal one.
    """
    num_rows, _, length, _ = query.shape
    if attention_mask is None:
        return num_rows * length * (length + 1) // 2
    assert attention_mask.dtype == torch.bool, attention_mask.dtype
    assert not attention_mask.is_meta, "what a mask hides is in its data"
    return int(attention_mask.sum()) * (num_rows // attention_mask.shape[0])


class _Attend(torch.autograd.Function):
    """[R, heads, T, D] and keys and values of fewer heads -> [R, T, heads, D]: two products forward, five backward."""

    @staticmethod
    def forward(ctx, query, key, value, num_pairs, counter):
        num_rows, num_heads, length, head_dim = query.shape
        ctx.counter, ctx.product_flop = counter, 2.0 * num_pairs * num_heads * head_dim
        counter.add_flop(ATTENTION, 2 * ctx.product_flop)
        output = query.new_empty(num_rows, length, num_heads, head_dim)
        normalisers = query.new_empty(num_rows, num_heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalisers)
        return output

    @staticmethod
    def backward(ctx, *grads):
        query, key, value, _, _ = ctx.saved_tensors
        ctx.counter.add_flop(ATTENTION, 5 * ctx.product_flop)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
