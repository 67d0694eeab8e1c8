"""DPOP, and DPO as DPOP without a penalty, straight from token log-probs: one Triton launch forward, one backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.kernels.launch import LAUNCH, Launch, meta
from dpop_kernels.kernels.pair_dpop import pair_dpop_fwd_kernel
from dpop_kernels.kernels.segments import segment_broadcast_launch
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.outputs import PairLosses

_NUM_METRICS = len(PairLosses._fields) - 1


def pair_dpop_loss(
    token_logps: Tensor,  # [N]
    cu_seqlens: Tensor,  # [3B + 1]
    ref_segment_logps: Tensor,  # [B, 3]
    options: LossOptions,
) -> PairLosses:
    """DPOP of every pair; all results are fp32.

    Segments are summed as the fused backend's `segment_sums` does, to the bit: where `ref_segment_logps` are such sums
    of the same log-probs, every log-ratio is exactly zero.
    """
    losses, metrics = _PairDpopLoss.apply(token_logps, cu_seqlens, ref_segment_logps, options)
    return PairLosses(losses, *metrics.unbind(0))


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
        segment_broadcast_launch(grad_losses, slopes, cu_seqlens, grad_token_logps).run()
        return grad_token_logps, None, None, None


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
    """Every kind of launch that this module makes, by a name that tells what is special about it."""
    return {
        "pair loss backward": segment_broadcast_launch(meta(2), meta(2, 3), meta(7, dtype=torch.int64), meta(8)),
        "pair loss, int32 bounds": _aot_pair_dpop(torch.int32),
        "pair loss, int64 bounds": _aot_pair_dpop(torch.int64),
        "pair loss, smoothed labels": _aot_pair_dpop(torch.int32, label_smoothing=0.1),
    }


def _aot_pair_dpop(bounds_dtype: torch.dtype, *, label_smoothing: float = 0.0) -> Launch:
    bounds, by_segment, metrics = meta(7, dtype=bounds_dtype), meta(2, 3), meta(_NUM_METRICS, 2)
    options = LossOptions(label_smoothing=label_smoothing)
    return _pair_dpop_launch(meta(8), bounds, by_segment, meta(2), by_segment, metrics, options)
