"""Sums of token log-probs over segments, and their gradient.

    sums[s] = sum of token_logps[n] for cu_seqlens[s] <= n < cu_seqlens[s + 1]
    grad_token_logps[n] = grad[s] of the segment that holds n

A segment is summed by one program, from its own first token on, in a fixed order: the same tokens give the same bits
wherever they lie in the batch and whichever kernel sums them.
"""

import triton
import triton.language as tl
from torch import Tensor

from dpop_kernels.kernels.launch import LAUNCH, Launch


@triton.jit
def segment_sum(token_logps_ptr, cu_seqlens_ptr, s, BLOCK_N: tl.constexpr):
    """Sum of tokens [cu_seqlens[s], cu_seqlens[s + 1]) in fp32: lane by lane, then one tree over the lanes."""
    end = tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(tl.load(cu_seqlens_ptr + s).to(tl.int64), end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        sums += tl.load(token_logps_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0)


@triton.jit
def segment_sum_kernel(
    token_logps_ptr,  # [N] in
    cu_seqlens_ptr,  # [S + 1] in, int32 or int64
    sums_ptr,  # [S] out, fp32
    BLOCK_N: tl.constexpr,
):
    s = tl.program_id(0)
    tl.store(sums_ptr + s, segment_sum(token_logps_ptr, cu_seqlens_ptr, s, BLOCK_N))


@triton.jit
def segment_broadcast_kernel(
    grad_ptr,  # [S / SEGMENTS_PER_GRAD] in, fp32
    weights_ptr,  # [S] in, fp32, if HAS_WEIGHTS
    cu_seqlens_ptr,  # [S + 1] in, int32 or int64
    grad_token_logps_ptr,  # [N] out; tokens outside all segments are left as they are
    HAS_WEIGHTS: tl.constexpr,
    SEGMENTS_PER_GRAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    s = tl.program_id(0)
    grad = tl.load(grad_ptr + s // SEGMENTS_PER_GRAD)
    if HAS_WEIGHTS:
        grad = grad * tl.load(weights_ptr + s)
    end = tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    for start in range(tl.load(cu_seqlens_ptr + s).to(tl.int64), end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        tl.store(grad_token_logps_ptr + n, grad.to(grad_token_logps_ptr.dtype.element_ty), mask=n < end)


def segment_sum_launch(token_logps: Tensor, cu_seqlens: Tensor, sums: Tensor) -> Launch:
    return Launch(
        kernel=segment_sum_kernel,
        num_programs=sums.shape[0],
        arguments={
            "token_logps_ptr": token_logps.contiguous(),
            "cu_seqlens_ptr": cu_seqlens.contiguous(),
            "sums_ptr": sums,
            "BLOCK_N": LAUNCH.block_n,
        },
        num_warps=LAUNCH.segment_warps,
    )


def segment_broadcast_launch(
    grads: Tensor,  # [S], or [S / 3] with weights
    weights: Tensor | None,  # [S / 3, 3]
    cu_seqlens: Tensor,  # [S + 1]
    grad_token_logps: Tensor,  # [N] out
) -> Launch:
    return Launch(
        kernel=segment_broadcast_kernel,
        num_programs=cu_seqlens.shape[0] - 1,
        arguments={
            "grad_ptr": grads.contiguous(),
            "weights_ptr": weights,
            "cu_seqlens_ptr": cu_seqlens.contiguous(),
            "grad_token_logps_ptr": grad_token_logps,
            "HAS_WEIGHTS": weights is not None,
            "SEGMENTS_PER_GRAD": 1 if weights is None else weights.shape[1],
            "BLOCK_N": LAUNCH.block_n,
        },
        num_warps=LAUNCH.segment_warps,
    )
