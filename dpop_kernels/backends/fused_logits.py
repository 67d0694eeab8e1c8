"""Logits -> token log-probs in Triton: the launches and the autograd of `kernels.log_softmax_gather`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.linear_tiles import HeadOptions
from dpop_kernels.kernels.launch import LAUNCH, Launch, meta
from dpop_kernels.kernels.log_softmax_gather import log_softmax_gather_bwd_kernel, log_softmax_gather_fwd_kernel
from dpop_kernels.outputs import TokenStats

_PLAIN = HeadOptions()


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
            **transform_arguments(options),
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
            **transform_arguments(options),
            "BLOCK_V": LAUNCH.block_v,
        },
        num_warps=LAUNCH.vocab_warps,
    )


def transform_arguments(options: HeadOptions) -> dict[str, float | bool]:
    """What every kernel that makes z of a raw logit is told about it."""
    return {
        "logit_scale": float(options.logit_scale),
        "softcap": 1.0 if options.softcap is None else float(options.softcap),
        "HAS_SCALE": options.logit_scale != 1.0,
        "HAS_SOFTCAP": options.softcap is not None,
    }


def aot_launches() -> dict[str, Launch]:
    """Every kind of launch that this module makes, by a name that tells what is special about it."""
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
    }


def _aot_forward(
    dtype: torch.dtype, vocab_size: int, *, with_stats: bool = False, options: HeadOptions = _PLAIN
) -> Launch:
    logits, row, row64 = meta(2, vocab_size, dtype=dtype), meta(2), meta(2, dtype=torch.float64)
    stats = TokenStats(row, row, meta(2, dtype=torch.bool)) if with_stats else None
    return _forward_launch(logits, meta(2, dtype=torch.int64), row, row64, stats, options)


def _aot_backward(
    dtype: torch.dtype, grad_dtype: torch.dtype, vocab_size: int, *, options: HeadOptions = _PLAIN
) -> Launch:
    logits, grad_logits = meta(2, vocab_size, dtype=dtype), meta(2, vocab_size, dtype=grad_dtype)
    row, row64 = meta(2), meta(2, dtype=torch.float64)
    return _backward_launch(logits, meta(2, dtype=torch.int64), row, row64, row, grad_logits, options, vocab_start=0)


def _with_contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _has_separate_contiguous_rows(logits: Tensor) -> bool:
    num_rows, vocab_size = logits.shape
    return logits.stride(1) == 1 and (num_rows <= 1 or logits.stride(0) >= vocab_size)
