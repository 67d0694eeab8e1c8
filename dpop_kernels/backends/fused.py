"""The Triton kernels as differentiable functions: launches and autograd, no arithmetic of its own.

The kernels take fp32, bf16 and fp16 and compute in fp32. Nothing here reads a value back from the device, and no
torch operation here is one that autocast would change.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends import linear_tiles
from dpop_kernels.backends.linear_tiles import HeadOptions
from dpop_kernels.kernels.launch import LAUNCH, Launch
from dpop_kernels.kernels.log_softmax_gather import log_softmax_gather_bwd_kernel, log_softmax_gather_fwd_kernel
from dpop_kernels.kernels.pair_loss import pair_dpop_fwd_kernel, segment_broadcast_kernel, segment_sum_kernel
from dpop_kernels.outputs import PairLosses, TokenStats

_PLAIN = HeadOptions()
_NUM_METRICS = len(PairLosses._fields) - 1


def token_logps(
    logits: Tensor,  # [N, V]
    target_ids: Tensor,  # [N]
    *,
    inplace_backward: bool = False,
    with_stats: bool = False,
) -> tuple[Tensor, TokenStats | None]:
    """log softmax(logits)[n, target_ids[n]] -> [N] fp32. Forward reads the logits once and stores nothing as large.

    With `inplace_backward` the backward writes the gradient over the logits and returns their own storage, so that no
    second [N, V] is ever allocated. The logits are gone from then on: autograd refuses a second backward, and any other
    operation that still needs their values. A target id outside [0, V) gives NaN.

    Raises:
        ValueError: `inplace_backward` with logits whose rows are not contiguous, or overlap.
    """
    if inplace_backward and not _has_separate_contiguous_rows(logits):
        raise ValueError(
            f"inplace_backward: expected logits with contiguous rows that do not overlap, got shape "
            f"{list(logits.shape)} with strides {list(logits.stride())}. Call .contiguous() on them, or leave "
            "inplace_backward off."
        )
    logps, *stats = _TokenLogps.apply(_with_contiguous_rows(logits), target_ids, inplace_backward, with_stats)
    return logps, TokenStats(*stats) if with_stats else None


def linear_token_logps(
    hidden_states: Tensor,  # [N, H]
    lm_head_weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_stats: bool = False,
) -> tuple[Tensor, TokenStats | None]:
    """`token_logps` of the head's logits, one tile at a time (see `linear_tiles`)."""
    return linear_tiles.linear_token_logps(
        _TritonTileOps(),
        hidden_states,
        lm_head_weight,
        target_ids,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        with_stats=with_stats,
    )


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
) -> PairLosses:
    """DPOP from token log-probs in one launch, backward in another. All results are fp32.

    Segments are summed as `segment_sums` does, to the bit: where `ref_segment_logps` are such sums of the same
    log-probs, every log-ratio is exactly zero.
    """
    losses, metrics = _PairDpopLoss.apply(token_logps, cu_seqlens, ref_segment_logps, beta, dpop_lambda)
    return PairLosses(losses, *metrics.unbind(0))


def tile_forward(
    tile: Tensor,  # [R, V] raw logits
    target_ids: Tensor,  # [R]
    options: HeadOptions = _PLAIN,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor, TokenStats | None]:
    """Log-probs [R] fp32, log-normaliser of z [R] fp64, statistics. Not differentiable."""
    num_rows = tile.shape[0]
    logps = tile.new_empty(num_rows, dtype=torch.float32)
    lse = tile.new_empty(num_rows, dtype=torch.float64)
    stats = None
    if with_stats:
        stats = TokenStats(torch.empty_like(logps), torch.empty_like(logps), torch.empty_like(logps, dtype=torch.bool))
    _forward_launch(tile, target_ids, logps, lse, stats, options).run()
    return logps, lse, stats


def tile_backward(
    tile: Tensor,  # [R, C] raw logits, columns vocab_start and on of the vocabulary
    target_ids: Tensor,  # [R], counted in the whole vocabulary
    logps: Tensor,  # [R]
    lse: Tensor,  # [R] of the whole vocabulary, fp64 or fp32
    grad_logps: Tensor,  # [R]
    options: HeadOptions = _PLAIN,
    *,
    vocab_start: int = 0,
    out: Tensor,  # [R, C], any floating dtype; may be the tile
) -> Tensor:
    """grad_logps · d logps / d tile, written to `out` and returned. A row of weight zero gets zeros, unread."""
    _backward_launch(tile, target_ids, logps, lse, grad_logps, out, options, vocab_start).run()
    return out


class _TritonTileOps:
    """`linear_tiles.TileOps` in Triton."""

    def forward(self, tile, target_ids, options, with_stats):
        return tile_forward(tile, target_ids, options, with_stats)

    def forward_gradient(self, tile, target_ids, options, with_stats, out):
        logps, lse, stats = tile_forward(tile, target_ids, options, with_stats)
        tile_backward(tile, target_ids, logps, lse, torch.ones_like(logps), options, out=out)
        return logps, stats

    def block_gradient(self, tile, target_ids, logps, lse, grad_logps, options, vocab_start, out):
        tile_backward(tile, target_ids, logps, lse, grad_logps, options, vocab_start=vocab_start, out=out)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, inplace_backward, with_stats):
        logps, lse, stats = tile_forward(logits, target_ids, with_stats=with_stats)
        ctx.save_for_backward(logits, target_ids, logps, lse)
        ctx.inplace_backward = inplace_backward
        ctx.set_materialize_grads(False)
        stats = () if stats is None else tuple(stats)
        ctx.mark_non_differentiable(*stats)
        return logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        if grad_logps is None:
            return None, None, None, None
        logits, target_ids, logps, lse = ctx.saved_tensors
        if ctx.inplace_backward:
            grad_logits = tile_backward(logits, target_ids, logps, lse, grad_logps, out=logits.detach())
            # autograd cannot see the kernel write; this makes it refuse every later use of the saved logits
            torch.autograd.graph.increment_version(logits)
        else:
            out = torch.empty_like(logits, memory_format=torch.contiguous_format)
            grad_logits = tile_backward(logits, target_ids, logps, lse, grad_logps, out=out)
        return grad_logits, None, None, None


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
    def forward(ctx, token_logps, cu_seqlens, ref_segment_logps, beta, dpop_lambda):
        num_pairs = ref_segment_logps.shape[0]
        losses = token_logps.new_empty(num_pairs, dtype=torch.float32)
        slopes = losses.new_empty(num_pairs, 3)
        metrics = losses.new_empty(_NUM_METRICS, num_pairs)
        _pair_dpop_launch(
            token_logps, cu_seqlens, ref_segment_logps, losses, slopes, metrics, beta=beta, dpop_lambda=dpop_lambda
        ).run()
        ctx.save_for_backward(cu_seqlens, slopes)
        ctx.num_tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics)
        return losses, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _):
        if grad_losses is None:
            return None, None, None, None, None
        cu_seqlens, slopes = ctx.saved_tensors
        grad_token_logps = grad_losses.new_zeros(ctx.num_tokens, dtype=ctx.dtype)
        _segment_broadcast_launch(grad_losses, slopes, cu_seqlens, grad_token_logps).run()
        return grad_token_logps, None, None, None, None


def _forward_launch(
    logits: Tensor,  # [N, V]
    target_ids: Tensor,  # [N]
    logps: Tensor,  # [N] out
    lse: Tensor,  # [N] out
    stats: TokenStats | None,  # [N] each, out
    options: HeadOptions,
) -> Launch:
    return Launch(
        kernel=log_softmax_gather_fwd_kernel,
        num_programs=logits.shape[0],
        arguments={
            "logits_ptr": logits,
            "target_ids_ptr": target_ids.long().contiguous(),
            "logps_ptr": logps,
            "lse_ptr": lse,
            "entropy_ptr": None if stats is None else stats.entropy,
            "mean_logit_ptr": None if stats is None else stats.mean_logit,
            "is_top1_ptr": None if stats is None else stats.is_top1.view(torch.uint8),
            "V": logits.shape[1],
            "stride_logits_n": logits.stride(0),
            **_transform_arguments(options),
            "HAS_STATS": stats is not None,
            "BLOCK_V": LAUNCH.block_v,
        },
        num_warps=LAUNCH.vocab_warps,
    )


def _backward_launch(
    logits: Tensor,  # [N, V]
    target_ids: Tensor,  # [N]
    logps: Tensor,  # [N]
    lse: Tensor,  # [N]
    grad_logps: Tensor,  # [N]
    grad_logits: Tensor,  # [N, V] out
    options: HeadOptions,
    vocab_start: int,
) -> Launch:
    num_rows, vocab_size = logits.shape
    return Launch(
        kernel=log_softmax_gather_bwd_kernel,
        num_programs=num_rows * -(-vocab_size // LAUNCH.block_v),
        arguments={
            "logits_ptr": logits,
            "target_ids_ptr": target_ids.long().contiguous(),
            "logps_ptr": logps.contiguous(),
            "lse_ptr": lse.contiguous(),
            "grad_logps_ptr": grad_logps.contiguous(),
            "grad_logits_ptr": grad_logits,
            "V": vocab_size,
            "vocab_start": vocab_start,
            "stride_logits_n": logits.stride(0),
            "stride_grad_logits_n": grad_logits.stride(0),
            **_transform_arguments(options),
            "BLOCK_V": LAUNCH.block_v,
        },
        num_warps=LAUNCH.vocab_warps,
    )


def _transform_arguments(options: HeadOptions) -> dict[str, float | bool]:
    return {
        "logit_scale": float(options.logit_scale),
        "softcap": 1.0 if options.softcap is None else float(options.softcap),
        "HAS_SCALE": options.logit_scale != 1.0,
        "HAS_SOFTCAP": options.softcap is not None,
    }


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
    *,
    beta: float,
    dpop_lambda: float,
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
            "beta": float(beta),
            "dpop_lambda": float(dpop_lambda),
            "BLOCK_N": LAUNCH.block_n,
        },
        num_warps=LAUNCH.segment_warps,
    )


def aot_launches() -> dict[str, Launch]:
    """Every kind of launch that this module makes, by a name that tells what is special about it.

    For `dpop_kernels.aot` to compile: tensors without data go through the functions that make the real launches, so
    that what is compiled ahead of time cannot drift from what runs.
    """
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    aligned, ragged = 128256, 50257  # Llama 3's vocabulary; GPT-2's, whose rows start at any alignment
    capped = HeadOptions(logit_scale=0.5, softcap=30.0)
    return {
        "fp32": _aot_forward(fp32, aligned),
        "bf16": _aot_forward(bf16, aligned),
        "fp16": _aot_forward(fp16, aligned),
        "bf16, ragged rows": _aot_forward(bf16, ragged),
        "bf16, stats": _aot_forward(bf16, aligned, with_stats=True),
        "fp32, softcap, stats": _aot_forward(fp32, aligned, with_stats=True, options=capped),
        "fp32 -> fp32": _aot_backward(fp32, fp32, aligned),
        "bf16 -> bf16": _aot_backward(bf16, bf16, aligned),
        "fp16 -> fp16": _aot_backward(fp16, fp16, aligned),
        "bf16 -> bf16, ragged rows": _aot_backward(bf16, bf16, ragged),
        "fp32 -> bf16, softcap": _aot_backward(fp32, bf16, aligned, options=capped),
        "segment sum, int32 bounds": _aot_segment_sum(torch.int32),
        "segment sum, int64 bounds": _aot_segment_sum(torch.int64),
        "segment sum backward": _aot_segment_broadcast(has_weights=False),
        "pair loss backward": _aot_segment_broadcast(has_weights=True),
        "pair loss, int32 bounds": _aot_pair_dpop(torch.int32),
        "pair loss, int64 bounds": _aot_pair_dpop(torch.int64),
    }


def _aot_forward(
    dtype: torch.dtype, vocab_size: int, *, with_stats: bool = False, options: HeadOptions = _PLAIN
) -> Launch:
    logits, row, row64 = _meta(2, vocab_size, dtype=dtype), _meta(2), _meta(2, dtype=torch.float64)
    stats = TokenStats(row, row, _meta(2, dtype=torch.bool)) if with_stats else None
    return _forward_launch(logits, _meta(2, dtype=torch.int64), row, row64, stats, options)


def _aot_backward(
    dtype: torch.dtype, grad_dtype: torch.dtype, vocab_size: int, *, options: HeadOptions = _PLAIN
) -> Launch:
    logits, grad_logits = _meta(2, vocab_size, dtype=dtype), _meta(2, vocab_size, dtype=grad_dtype)
    row, row64 = _meta(2), _meta(2, dtype=torch.float64)
    return _backward_launch(logits, _meta(2, dtype=torch.int64), row, row64, row, grad_logits, options, vocab_start=0)


def _aot_segment_sum(bounds_dtype: torch.dtype) -> Launch:
    return _segment_sum_launch(_meta(8), _meta(7, dtype=bounds_dtype), _meta(6))


def _aot_segment_broadcast(*, has_weights: bool) -> Launch:
    grads, weights = (_meta(2), _meta(2, 3)) if has_weights else (_meta(6), None)
    return _segment_broadcast_launch(grads, weights, _meta(7, dtype=torch.int64), _meta(8))


def _aot_pair_dpop(bounds_dtype: torch.dtype) -> Launch:
    bounds, by_segment, metrics = _meta(7, dtype=bounds_dtype), _meta(2, 3), _meta(_NUM_METRICS, 2)
    return _pair_dpop_launch(_meta(8), bounds, by_segment, _meta(2), by_segment, metrics, beta=0.3, dpop_lambda=50.0)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _with_contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _has_separate_contiguous_rows(logits: Tensor) -> bool:
    num_rows, vocab_size = logits.shape
    return logits.stride(1) == 1 and (num_rows <= 1 or logits.stride(0) >= vocab_size)
