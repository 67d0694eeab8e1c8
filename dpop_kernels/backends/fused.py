"""The Triton kernels as differentiable functions: launches and autograd, no arithmetic of its own.

The kernels take fp32, bf16 and fp16 and compute in fp32. Nothing here reads a value back from the device, and no
torch operation here is one that autocast would change. `fused_logits` and `fused_tiles` hold the two ways to token
log-probs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends import fused_logits, fused_tiles
from dpop_kernels.backends.fused_logits import token_logps
from dpop_kernels.kernels.launch import Launch, meta
from dpop_kernels.kernels.segments import segment_broadcast_launch, segment_sum_launch

__all__ = ["RUNS_TRITON", "TILES", "aot_launches", "segment_sums", "token_logps"]

RUNS_TRITON = True
TILES = fused_tiles


def segment_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of token_logps over [cu_seqlens[i], cu_seqlens[i + 1]) -> [S] fp32. Empty segments sum to zero."""
    return _SegmentSums.apply(token_logps, cu_seqlens)


class _SegmentSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps, cu_seqlens):
        sums = token_logps.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)
        segment_sum_launch(token_logps, cu_seqlens, sums).run()
        ctx.save_for_backward(cu_seqlens)
        ctx.num_tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums):
        (cu_seqlens,) = ctx.saved_tensors
        # zeros: a token outside all segments has no gradient
        grad_token_logps = grad_sums.new_zeros(ctx.num_tokens, dtype=ctx.dtype)
        segment_broadcast_launch(grad_sums, None, cu_seqlens, grad_token_logps).run()
        return grad_token_logps, None


def aot_launches() -> dict[str, Launch]:
    """Every kind of launch that this backend makes, by a name that tells what is special about it."""
    return {
        **fused_logits.aot_launches(),
        **fused_tiles.aot_launches(),
        "segment sum, int32 bounds": _aot_segment_sum(torch.int32),
        "segment sum, int64 bounds": _aot_segment_sum(torch.int64),
        "segment sum backward": segment_broadcast_launch(meta(6), None, meta(7, dtype=torch.int64), meta(8)),
    }


def _aot_segment_sum(bounds_dtype: torch.dtype) -> Launch:
    return segment_sum_launch(meta(8), meta(7, dtype=bounds_dtype), meta(6))
