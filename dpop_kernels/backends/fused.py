"""The Triton kernels as differentiable functions: launches and autograd, no arithmetic of its own.

The kernels take fp32, bf16 and fp16 and compute in fp32. Nothing here reads a value back from the device, and no
torch operation here is one that autocast would change. This file holds what comes after the token log-probs;
`fused_logits` and `fused_linear` hold the two ways to them.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends import fused_launches, fused_logits
from dpop_kernels.backends.fused_linear import linear_token_logps
from dpop_kernels.backends.fused_logits import tile_backward, tile_forward, token_logps
from dpop_kernels.kernels.launch import LAUNCH, Launch, meta
from dpop_kernels.kernels.pair_loss import pair_dpop_fwd_kernel, segment_broadcast_kernel, segment_sum_kernel
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.outputs import PairLosses

__all__ = [
    "aot_launches",
    "linear_token_logps",
    "pair_dpop_loss",
    "segment_sums",
    "tile_backward",
    "tile_forward",
    "token_logps",
]

_NUM_METRICS = len(PairLosses._fields) - 1


def segment_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of token_logps over [cu_seqlens[i], cu_seqlens[i + 1]) -> [S] fp32. Empty segments sum to zero."""
    return _SegmentSums.apply(token_logps, cu_seqlens)


def pair_dpop_loss(
    token_logps: Tensor,  # [N]
    cu_seqlens: Tensor,  # [3B + 1]
    ref_segment_logps: Tensor,  # [B, 3]
    *,
    beta: float,
    dpop_lambda: float,
    dead_zone: float = 0.0,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """DPOP from token log-probs in one launch, backward in another. All results are fp32.

    Segments are summed as `segment_sums` does, to the bit: where `ref_segment_logps` are such sums of the same
    log-probs, every log-ratio is exactly zero.
    """
    options = LossOptions(beta, dpop_lambda, dead_zone, label_smoothing)
    losses, metrics = _PairDpopLoss.apply(token_logps, cu_seqlens, ref_segment_logps, options)
    return PairLosses(losses, *metrics.unbind(0))


class _SegmentSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps, cu_seqlens):
        sums = token_logps.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)
        _segment_sum_launch(token_logps, cu_seqlens, sums).run()
        ctx.save_for_backward(cu_seqlens)
        ctx.num_tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums):
        (cu_seqlens,) = ctx.saved_tensors
        # zeros: a token outside all segments has no gradient
        grad_token_logps = grad_sums.new_zeros(ctx.num_tokens, dtype=ctx.dtype)
        _segment_broadcast_launch(grad_sums, None, cu_seqlens, grad_token_logps).run()
        return grad_token_logps, None


class _PairDpopLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps, cu_seqlens, ref_segment_logps, options):
        num_pairs = ref_segment_logps.shape[0]
        losses = token_logps.new_empty(num_pairs, dtype=torch.float32)
        slopes = losses.new_empty(num_pairs, 3)
        metrics = losses.new_empty(_NUM_METRICS, num_pairs)
        _pair_dpop_launch(token_logps, cu_seqlens, ref_segment_logps, losses, slopes, metrics, options).run()
        ctx.save_for_backward(cu_seqlens, slopes)
        ctx.num_tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics)
        return losses, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _):
        if grad_losses is None:
            return None, None, None, None
        cu_seqlens, slopes = ctx.saved_tensors
        grad_token_logps = grad_losses.new_zeros(ctx.num_tokens, dtype=ctx.dtype)
        _segment_broadcast_launch(grad_losses, slopes, cu_seqlens, grad_token_logps).run()
        return grad_token_logps, None, None, None


def _segment_sum_launch(token_logps: Tensor, cu_seqlens: Tensor, sums: Tensor) -> Launch:
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


def _segment_broadcast_launch(
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


def _pair_dpop_launch(
    token_logps: Tensor,  # [N]
    cu_seqlens: Tensor,  # [3B + 1]
    ref_segment_logps: Tensor,  # [B, 3]
    losses: Tensor,  # [B] out
    slopes: Tensor,  # [B, 3] out
    metrics: Tensor,  # [6, B] out
    options: LossOptions,
) -> Launch:
    num_pairs = losses.shape[0]
    return Launch(
        kernel=pair_dpop_fwd_kernel,
        num_programs=num_pairs,
        arguments={
            "token_logps_ptr": token_logps.contiguous(),
            "cu_seqlens_ptr": cu_seqlens.contiguous(),
            "ref_segment_logps_ptr": ref_segment_logps.contiguous(),
            "losses_ptr": losses,
            "slopes_ptr": slopes,
            "metrics_ptr": metrics,
            "B": num_pairs,
            "beta": float(options.beta),
            "dpop_lambda": float(options.dpop_lambda),
            "dead_zone": float(options.dead_zone),
            "label_smoothing": float(options.label_smoothing),
            "HAS_SMOOTHING": options.label_smoothing != 0,
            "BLOCK_N": LAUNCH.block_n,
        },
        num_warps=LAUNCH.segment_warps,
    )


def aot_launches() -> dict[str, Launch]:
    """Every kind of launch that this module makes, by a name that tells what is special about it.

    For `dpop_kernels.aot` to compile: tensors without data go through the functions that make the real launches, so
    that what is compiled ahead of time cannot drift from what runs.
    """
    return {
        **fused_logits.aot_launches(),
        **fused_launches.aot_launches(),
        "segment sum, int32 bounds": _aot_segment_sum(torch.int32),
        "segment sum, int64 bounds": _aot_segment_sum(torch.int64),
        "segment sum backward": _aot_segment_broadcast(has_weights=False),
        "pair loss backward": _aot_segment_broadcast(has_weights=True),
        "pair loss, int32 bounds": _aot_pair_dpop(torch.int32),
        "pair loss, int64 bounds": _aot_pair_dpop(torch.int64),
        "pair loss, smoothed labels": _aot_pair_dpop(torch.int32, label_smoothing=0.1),
    }


def _aot_segment_sum(bounds_dtype: torch.dtype) -> Launch:
    return _segment_sum_launch(meta(8), meta(7, dtype=bounds_dtype), meta(6))


def _aot_segment_broadcast(*, has_weights: bool) -> Launch:
    grads, weights = (meta(2), meta(2, 3)) if has_weights else (meta(6), None)
    return _segment_broadcast_launch(grads, weights, meta(7, dtype=torch.int64), meta(8))


def _aot_pair_dpop(bounds_dtype: torch.dtype, *, label_smoothing: float = 0.0) -> Launch:
    bounds, by_segment, metrics = meta(7, dtype=bounds_dtype), meta(2, 3), meta(_NUM_METRICS, 2)
    options = LossOptions(label_smoothing=label_smoothing)
    return _pair_dpop_launch(meta(8), bounds, by_segment, meta(2), by_segment, metrics, options)
