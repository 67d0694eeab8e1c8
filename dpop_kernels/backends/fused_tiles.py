"""`TileOps` in Triton: the launches of `kernels.linear_logps` and of the logits' gradient. No arithmetic of its own.

Matrix products take the inputs' dtype and give fp32; torch's setting `allow_tf32` applies to fp32 inputs as everywhere.
"""

import torch
from torch import Tensor

from dpop_kernels.backends.bounds import TileBounds, triton_bounds
from dpop_kernels.backends.protocol import EntropyGrads, RowResults, RowSums
from dpop_kernels.kernels.launch import LAUNCH, Launch, meta
from dpop_kernels.kernels.linear_logps import head_rows_bwd_kernel, head_rows_fwd_kernel, head_tile_fwd_kernel
from dpop_kernels.kernels.log_softmax_gather import log_softmax_gather_bwd_kernel
from dpop_kernels.logps.head import PLAIN, Head, LogitTransform


def tile_bounds(device: torch.device) -> TileBounds:
    return triton_bounds()


def tile_forward(
    tile: Tensor,  # [R, C] fp32, contiguous
    target_ids: Tensor,  # [R], counted in the whole vocabulary
    sums: RowSums,  # in and out
    transform: LogitTransform,
    *,
    vocab_start: int = 0,
    exps: Tensor | None = None,  # [R, C] out
    products: Tensor | None = None,  # [R, H] in and out
) -> None:
    _tile_launch(tile, target_ids, sums, exps, products, vocab_start, transform).run()


def rows_forward(
    sums: RowSums,
    target_ids: Tensor,
    products: Tensor | None,
    head: Head,
    results: RowResults,
    *,
    vocab_size: int,
) -> None:
    assert vocab_size == head.weight.shape[0]
    _rows_forward_launch(sums, target_ids, products, head.weight, results, head.transform).run()


def rows_backward(unit_grads: Tensor, other_mass: Tensor, grad_logps: Tensor, out: Tensor) -> None:
    _rows_backward_launch(unit_grads, other_mass, grad_logps, out).run()


def tile_backward(
    tile: Tensor,  # [R, C] raw logits, columns vocab_start and on of the vocabulary
    target_ids: Tensor,  # [R], counted in the whole vocabulary
    logps: Tensor,  # [R]
    lse: Tensor,  # [R] of the whole vocabulary, fp64 or fp32
    grad_logps: Tensor,  # [R]
    transform: LogitTransform,
    *,
    vocab_start: int = 0,
    entropy: EntropyGrads | None = None,
    out: Tensor,  # [R, C], any floating dtype; may be the tile
) -> Tensor:
    """A row of weight zero gets zeros, unread."""
    _backward_launch(tile, target_ids, logps, lse, grad_logps, out, transform, vocab_start, entropy).run()
    return out


def _tile_launch(
    logits: Tensor,  # [R, C]
    target_ids: Tensor,  # [R]
    sums: RowSums,  # in and out
    exps: Tensor | None,  # [R, C] out
    products: Tensor | None,  # [R, H] in and out
    vocab_start: int,
    transform: LogitTransform,
) -> Launch:
    return Launch(
        kernel=head_tile_fwd_kernel,
        num_programs=logits.shape[0],
        arguments={
            "logits_ptr": logits,
            "target_ids_ptr": target_ids,
            "maxima_ptr": sums.maxima,
            "sums_ptr": sums.sums,
            "target_logits_ptr": sums.target_logits,
            "moments_ptr": sums.moments,
            "totals_ptr": sums.totals,
            "squares_ptr": sums.squares,
            "exps_ptr": exps,
            "products_ptr": products,
            "C": logits.shape[1],
            "H": 0 if products is None else products.shape[1],
            "vocab_start": vocab_start,
            **transform_arguments(transform),
            "HAS_STATS": sums.moments is not None,
            "HAS_EXPS": products is not None,
            "BLOCK_C": LAUNCH.head_columns,
            "BLOCK_H": LAUNCH.block_h,
        },
        num_warps=LAUNCH.head_warps,
    )


def _rows_forward_launch(
    sums: RowSums,
    target_ids: Tensor,  # [R]
    products: Tensor | None,  # [R, H]
    weight: Tensor,  # [V, H]
    results: RowResults,  # out
    transform: LogitTransform,
) -> Launch:
    stats = results.stats
    has_grad = products is not None
    return Launch(
        kernel=head_rows_fwd_kernel,
        num_programs=sums.maxima.shape[0],
        arguments={
            "maxima_ptr": sums.maxima,
            "sums_ptr": sums.sums,
            "target_logits_ptr": sums.target_logits,
            "moments_ptr": sums.moments,
            "totals_ptr": sums.totals,
            "squares_ptr": sums.squares,
            "target_ids_ptr": target_ids,
            "products_ptr": products,
            "weight_ptr": weight if has_grad else None,
            "logps_ptr": results.logps,
            "lse_ptr": results.lse,
            "entropy_ptr": None if stats is None else stats.entropy,
            "mean_logit_ptr": None if stats is None else stats.mean_logit,
            "is_top1_ptr": None if stats is None else stats.is_top1.view(torch.uint8),
            "log_sum_sq_probs_ptr": None if stats is None else stats.log_sum_sq_probs,
            "other_mass_ptr": results.other_mass,
            "unit_grads_ptr": results.unit_grads,
            "V": weight.shape[0],
            "H": weight.shape[1],
            "stride_weight_v": weight.stride(0),
            "stride_weight_h": weight.stride(1),
            **transform_arguments(transform),
            "HAS_STATS": stats is not None,
            "HAS_GRAD": has_grad,
            "BLOCK_H": LAUNCH.block_h,
        },
        num_warps=LAUNCH.segment_warps,
    )


def _rows_backward_launch(
    unit_grads: Tensor,  # [N, H]
    other_mass: Tensor,  # [N]
    grad_logps: Tensor,  # [N]
    grad_hidden: Tensor,  # [N, H] out
) -> Launch:
    num_tokens, hidden_size = unit_grads.shape
    return Launch(
        kernel=head_rows_bwd_kernel,
        num_programs=num_tokens * -(-hidden_size // LAUNCH.block_h),
        arguments={
            "unit_grads_ptr": unit_grads,
            "other_mass_ptr": other_mass,
            "grad_logps_ptr": grad_logps.contiguous(),
            "grad_hidden_ptr": grad_hidden,
            "H": hidden_size,
            "BLOCK_H": LAUNCH.block_h,
        },
        num_warps=LAUNCH.segment_warps,
    )


def _backward_launch(
    logits: Tensor,  # [N, V]
    target_ids: Tensor,  # [N]
    logps: Tensor,  # [N]
    lse: Tensor,  # [N]
    grad_logps: Tensor,  # [N]
    grad_logits: Tensor,  # [N, V] out
    transform: LogitTransform,
    vocab_start: int,
    entropy: EntropyGrads | None,
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
            "entropies_ptr": None if entropy is None else entropy.entropies,
            "grad_entropies_ptr": None if entropy is None else entropy.grads.contiguous(),
            "grad_logits_ptr": grad_logits,
            "V": vocab_size,
            "vocab_start": vocab_start,
            "stride_logits_n": logits.stride(0),
            "stride_grad_logits_n": grad_logits.stride(0),
            **transform_arguments(transform),
            "HAS_ENTROPY": entropy is not None,
            "BLOCK_V": LAUNCH.block_v,
        },
        num_warps=LAUNCH.vocab_warps,
    )


def transform_arguments(transform: LogitTransform) -> dict[str, float | bool]:
    """What every kernel that makes z of a raw logit is told about it."""
    return {
        "logit_scale": float(transform.scale),
        "softcap": 1.0 if transform.softcap is None else float(transform.softcap),
        "HAS_SCALE": transform.scale != 1.0,
        "HAS_SOFTCAP": transform.softcap is not None,
    }


def aot_launches() -> dict[str, Launch]:
    """Every kind of launch that this module makes, by a name that tells what is special about it."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    aligned, ragged = 128256, 50257  # Llama 3's vocabulary; GPT-2's, whose rows start at any alignment
    capped = LogitTransform(scale=0.5, softcap=30.0)
    return {
        "tile": _aot_tile(),
        "tile, stats": _aot_tile(with_stats=True),
        "tile -> bf16": _aot_tile(bf16),
        "tile -> fp16": _aot_tile(fp16),
        "tile -> fp32": _aot_tile(fp32),
        "tile -> bf16, ragged": _aot_tile(bf16, num_columns=1105),  # GPT-2's last: 50257 = 6 * 8192 + 1105 columns
        "tile -> bf16, softcap, stats": _aot_tile(bf16, transform=capped, with_stats=True),
        "rows": _aot_rows(bf16, has_gradient=False),
        "rows, stats": _aot_rows(bf16, has_gradient=False, with_stats=True),
        "rows, bf16": _aot_rows(bf16),
        "rows, fp32, softcap, stats": _aot_rows(fp32, transform=capped, with_stats=True),
        "rows backward, bf16": _aot_rows_backward(bf16),
        "rows backward, fp32": _aot_rows_backward(fp32),
        "fp32 -> fp32": _aot_backward(fp32, fp32, aligned),
        "bf16 -> bf16": _aot_backward(bf16, bf16, aligned),
        "fp16 -> fp16": _aot_backward(fp16, fp16, aligned),
        "bf16 -> bf16, ragged rows": _aot_backward(bf16, bf16, ragged),
        "fp32 -> bf16, softcap": _aot_backward(fp32, bf16, aligned, transform=capped),
        "softcap, entropy": _aot_backward(fp32, bf16, aligned, transform=capped, with_entropy=True),
    }


_AOT_ROWS, _AOT_HIDDEN, _AOT_VOCAB = 1024, 4096, 128256


def _aot_sums(*, with_stats: bool) -> RowSums:
    return RowSums.empty(_AOT_ROWS, torch.float32, torch.device("meta"), with_stats=with_stats)


def _aot_tile(
    exps_dtype: torch.dtype | None = None,
    *,
    num_columns: int = LAUNCH.head_columns,
    transform: LogitTransform = PLAIN,
    with_stats: bool = False,
) -> Launch:
    exps = None if exps_dtype is None else meta(_AOT_ROWS, num_columns, dtype=exps_dtype)
    products = None if exps is None else meta(_AOT_ROWS, _AOT_HIDDEN)
    target_ids, sums = meta(_AOT_ROWS, dtype=torch.int64), _aot_sums(with_stats=with_stats)
    return _tile_launch(meta(_AOT_ROWS, num_columns), target_ids, sums, exps, products, 0, transform)


def _aot_rows(
    dtype: torch.dtype,
    *,
    has_gradient: bool = True,
    transform: LogitTransform = PLAIN,
    with_stats: bool = False,
) -> Launch:
    hidden_states = meta(_AOT_ROWS, _AOT_HIDDEN, dtype=dtype)
    results = RowResults.empty(hidden_states, torch.float32, with_stats=with_stats, with_gradient=has_gradient)
    products = meta(_AOT_ROWS, _AOT_HIDDEN) if has_gradient else None
    weight, target_ids = meta(_AOT_VOCAB, _AOT_HIDDEN, dtype=dtype), meta(_AOT_ROWS, dtype=torch.int64)
    sums = _aot_sums(with_stats=with_stats)
    return _rows_forward_launch(sums, target_ids, products, weight, results, transform)


def _aot_rows_backward(dtype: torch.dtype) -> Launch:
    rows = meta(_AOT_ROWS, _AOT_HIDDEN, dtype=dtype)
    return _rows_backward_launch(rows, meta(_AOT_ROWS), meta(_AOT_ROWS), rows)


def _aot_backward(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    vocab_size: int,
    *,
    transform: LogitTransform = PLAIN,
    with_entropy: bool = False,
) -> Launch:
    logits, grad_logits = meta(2, vocab_size, dtype=dtype), meta(2, vocab_size, dtype=grad_dtype)
    row, row64, ids = meta(2), meta(2, dtype=torch.float64), meta(2, dtype=torch.int64)
    entropy = EntropyGrads(row, row) if with_entropy else None
    return _backward_launch(logits, ids, row, row64, row, grad_logits, transform, vocab_start=0, entropy=entropy)
