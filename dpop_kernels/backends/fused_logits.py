"""Logits -> token log-probs in Triton: the launches and the autograd of `kernels.log_softmax_gather`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.fused_tiles import tile_backward
from dpop_kernels.backends.protocol import RowResults
from dpop_kernels.kernels.launch import LAUNCH, Launch, meta
from dpop_kernels.kernels.log_softmax_gather import log_softmax_gather_fwd_kernel
from dpop_kernels.logps.head import PLAIN
from dpop_kernels.outputs import TokenStats


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


def row_results(logits: Tensor, target_ids: Tensor, *, with_stats: bool = False) -> RowResults:
    """The forward alone: log-probs [N], log-normalisers [N] and what else belongs to rows. Not differentiable."""
    results = RowResults.empty(logits, torch.float32, with_stats=with_stats, with_gradient=False)
    _forward_launch(logits, target_ids, results).run()
    return results


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, inplace_backward, with_stats):
        results = row_results(logits, target_ids, with_stats=with_stats)
        ctx.save_for_backward(logits, target_ids, results.logps, results.lse)
        ctx.inplace_backward = inplace_backward
        ctx.set_materialize_grads(False)
        stats = () if results.stats is None else tuple(results.stats)
        ctx.mark_non_differentiable(*stats)
        return results.logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        if grad_logps is None:
            return None, None, None, None
        logits, target_ids, logps, lse = ctx.saved_tensors
        if ctx.inplace_backward:
            grad_logits = tile_backward(logits, target_ids, logps, lse, grad_logps, PLAIN, out=logits.detach())
            # autograd cannot see the kernel write; this makes it refuse every later use of the saved logits
            torch.autograd.graph.increment_version(logits)
        else:
            out = torch.empty_like(logits, memory_format=torch.contiguous_format)
            grad_logits = tile_backward(logits, target_ids, logps, lse, grad_logps, PLAIN, out=out)
        return grad_logits, None, None, None


def _forward_launch(
    logits: Tensor,  # [N, V]
    target_ids: Tensor,  # [N]
    results: RowResults,  # [N] each, out
) -> Launch:
    stats = results.stats
    return Launch(
        kernel=log_softmax_gather_fwd_kernel,
        num_programs=logits.shape[0],
        arguments={
            "logits_ptr": logits,
            "target_ids_ptr": target_ids.long().contiguous(),
            "logps_ptr": results.logps,
            "lse_ptr": results.lse,
            "entropy_ptr": None if stats is None else stats.entropy,
            "mean_logit_ptr": None if stats is None else stats.mean_logit,
            "is_top1_ptr": None if stats is None else stats.is_top1.view(torch.uint8),
            "log_sum_sq_probs_ptr": None if stats is None else stats.log_sum_sq_probs,
            "V": logits.shape[1],
            "stride_logits_n": logits.stride(0),
            "HAS_STATS": stats is not None,
            "BLOCK_V": LAUNCH.block_v,
        },
        num_warps=LAUNCH.vocab_warps,
    )


def aot_launches() -> dict[str, Launch]:
    """Every kind of launch that this module makes, by a name that tells what is special about it."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    aligned, ragged = 128256, 50257  # Llama 3's vocabulary; GPT-2's, whose rows start at any alignment
    return {
        "fp32": _aot_forward(fp32, aligned),
        "bf16": _aot_forward(bf16, aligned),
        "fp16": _aot_forward(fp16, aligned),
        "bf16, ragged rows": _aot_forward(bf16, ragged),
        "bf16, stats": _aot_forward(bf16, aligned, with_stats=True),
        "fp32, stats": _aot_forward(fp32, aligned, with_stats=True),
    }


def _aot_forward(dtype: torch.dtype, vocab_size: int, *, with_stats: bool = False) -> Launch:
    logits = meta(2, vocab_size, dtype=dtype)
    results = RowResults.empty(logits, torch.float32, with_stats=with_stats, with_gradient=False)
    return _forward_launch(logits, meta(2, dtype=torch.int64), results)


def _with_contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _has_separate_contiguous_rows(logits: Tensor) -> bool:
    num_rows, vocab_size = logits.shape
    return logits.stride(1) == 1 and (num_rows <= 1 or logits.stride(0) >= vocab_size)
