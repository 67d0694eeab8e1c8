"""The launches of the fused head: kernel, grid and arguments from tensors, and what they carry between them."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpop_kernels.backends.fused_logits import transform_arguments
from dpop_kernels.backends.linear_tiles import HeadOptions
from dpop_kernels.kernels.launch import LAUNCH, Launch, meta
from dpop_kernels.kernels.linear_gemm import head_gemm_fwd_kernel
from dpop_kernels.kernels.linear_logps import head_rows_bwd_kernel, head_rows_fwd_kernel, head_tile_fwd_kernel
from dpop_kernels.outputs import TokenStats

_PLAIN = HeadOptions()
_LOWEST = torch.finfo(torch.float32).min
# exp(70) times 2**18 columns is 7e35, within bf16 and fp32; exp(10) is 2e4, within fp16's 65504.
_EXP_RANGE = {torch.float32: 70.0, torch.bfloat16: 70.0, torch.float16: 10.0}


class RowSums(NamedTuple):
    """What a block of rows carries over the vocabulary, in P parts."""

    maxima: Tensor  # [R, P]
    sums: Tensor  # [R, P]
    target_logits: Tensor  # [R]
    moments: Tensor | None  # [R, P]
    totals: Tensor | None  # [R, P]

    @classmethod
    def empty(cls, num_rows: int, num_parts: int, device: torch.device, *, with_stats: bool = False) -> "RowSums":
        """Sums of nothing. A target logit that no tile fills in, for an id outside [0, V), stays NaN."""

        def full(value: float) -> Tensor:
            return torch.full((num_rows, num_parts), value, device=device)

        target_logits = torch.full((num_rows,), torch.nan, device=device)
        moments, totals = (full(0.0), full(0.0)) if with_stats else (None, None)
        return cls(full(_LOWEST), full(0.0), target_logits, moments, totals)


class Results(NamedTuple):
    """Results for all rows, each written a block at a time."""

    logps: Tensor  # [N]
    lse: Tensor  # [N] fp64
    stats: TokenStats | None  # [N] each
    other_mass: Tensor | None  # [N]: 1 - p
    unit_grads: Tensor | None  # [N, H]

    def rows(self, rows: slice) -> "Results":
        stats = None if self.stats is None else TokenStats(*(value[rows] for value in self.stats))
        other_mass = None if self.other_mass is None else self.other_mass[rows]
        unit_grads = None if self.unit_grads is None else self.unit_grads[rows]
        return Results(self.logps[rows], self.lse[rows], stats, other_mass, unit_grads)


def empty_results(hidden_states: Tensor, *, with_stats: bool, with_gradient: bool) -> Results:
    num_tokens = hidden_states.shape[0]
    logps = hidden_states.new_empty(num_tokens, dtype=torch.float32)
    stats = None
    if with_stats:
        stats = TokenStats(torch.empty_like(logps), torch.empty_like(logps), torch.empty_like(logps, dtype=torch.bool))
    other_mass = unit_grads = None
    if with_gradient:
        other_mass = torch.empty_like(logps)
        unit_grads = hidden_states.new_empty(hidden_states.shape, dtype=product_dtype(hidden_states))
    return Results(logps, torch.empty_like(logps, dtype=torch.float64), stats, other_mass, unit_grads)


def zero_products(hidden_rows: Tensor, results: Results) -> Tensor | None:
    """[R, H]: the sum over tiles of E W, if a gradient is wanted."""
    return None if results.unit_grads is None else hidden_rows.new_zeros(hidden_rows.shape, dtype=torch.float32)


def product_dtype(hidden_states: Tensor) -> torch.dtype:
    """What the matrix products take, and the unit gradient is kept in: the inputs' own dtype. A CPU, where the kernels
    are interpreted, has no 16-bit product with an fp32 result."""
    return torch.float32 if hidden_states.device.type == "cpu" else hidden_states.dtype


def ceil_div(total: int, size: int) -> int:
    return -(-total // size)


def tile_launch(
    logits: Tensor,  # [R, C]
    target_ids: Tensor,  # [R]
    row_sums: RowSums,  # in and out
    exps: Tensor | None,  # [R, C] out
    products: Tensor | None,  # [R, H] in and out
    vocab_start: int,
    options: HeadOptions,
) -> Launch:
    return Launch(
        kernel=head_tile_fwd_kernel,
        num_programs=logits.shape[0],
        arguments={
            "logits_ptr": logits,
            "target_ids_ptr": target_ids,
            "maxima_ptr": row_sums.maxima,
            "sums_ptr": row_sums.sums,
            "target_logits_ptr": row_sums.target_logits,
            "moments_ptr": row_sums.moments,
            "totals_ptr": row_sums.totals,
            "exps_ptr": exps,
            "products_ptr": products,
            "C": logits.shape[1],
            "H": 0 if products is None else products.shape[1],
            "vocab_start": vocab_start,
            **transform_arguments(options),
            "HAS_STATS": row_sums.moments is not None,
            "HAS_EXPS": products is not None,
            "BLOCK_C": LAUNCH.head_columns,
            "BLOCK_H": LAUNCH.block_h,
        },
        num_warps=LAUNCH.head_warps,
    )


def rows_forward_launch(
    row_sums: RowSums,
    target_ids: Tensor,  # [R]
    products: Tensor | None,  # [R, H]
    weight: Tensor,  # [V, H]
    results: Results,  # out
    options: HeadOptions,
) -> Launch:
    num_rows, num_parts = row_sums.maxima.shape
    stats = results.stats
    has_grad = products is not None
    return Launch(
        kernel=head_rows_fwd_kernel,
        num_programs=num_rows,
        arguments={
            "maxima_ptr": row_sums.maxima,
            "sums_ptr": row_sums.sums,
            "target_logits_ptr": row_sums.target_logits,
            "moments_ptr": row_sums.moments,
            "totals_ptr": row_sums.totals,
            "target_ids_ptr": target_ids,
            "products_ptr": products,
            "weight_ptr": weight if has_grad else None,
            "logps_ptr": results.logps,
            "lse_ptr": results.lse,
            "entropy_ptr": None if stats is None else stats.entropy,
            "mean_logit_ptr": None if stats is None else stats.mean_logit,
            "is_top1_ptr": None if stats is None else stats.is_top1.view(torch.uint8),
            "other_mass_ptr": results.other_mass,
            "unit_grads_ptr": results.unit_grads,
            "P": num_parts,
            "V": weight.shape[0],
            "H": weight.shape[1],
            "stride_weight_v": weight.stride(0),
            "stride_weight_h": weight.stride(1),
            **transform_arguments(options),
            "HAS_STATS": stats is not None,
            "HAS_GRAD": has_grad,
            "BLOCK_P": 1 << (num_parts - 1).bit_length(),
            "BLOCK_H": LAUNCH.block_h,
        },
        num_warps=LAUNCH.segment_warps,
    )


def rows_backward_launch(
    unit_grads: Tensor,  # [N, H]
    other_mass: Tensor,  # [N]
    grad_logps: Tensor,  # [N]
    grad_hidden: Tensor,  # [N, H] out
) -> Launch:
    num_tokens, hidden_size = unit_grads.shape
    return Launch(
        kernel=head_rows_bwd_kernel,
        num_programs=num_tokens * ceil_div(hidden_size, LAUNCH.block_h),
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


def gemm_launch(
    hidden_rows: Tensor,  # [R, H]
    weight: Tensor,  # [C, H]
    bias: Tensor | None,  # [C]
    target_ids: Tensor,  # [R]
    offsets: Tensor | None,  # [R, 1]
    row_sums: RowSums,  # out
    exps: Tensor | None,  # [R, C] out
    *,
    part_start: int,
    vocab_start: int,
    options: HeadOptions,
) -> Launch:
    (num_rows, hidden_size), num_columns = hidden_rows.shape, weight.shape[0]
    for name, tensor in (("hidden_states", hidden_rows), ("weight", weight)):
        assert tensor.stride(1) == 1, f"{name}: tensor-memory loads take contiguous rows"
        assert tensor.stride(0) * tensor.itemsize % 16 == 0, f"{name}: tensor-memory loads take rows of 16 bytes' step"
    num_tiles = ceil_div(num_rows, LAUNCH.gemm_block_r) * ceil_div(num_columns, LAUNCH.gemm_block_v)
    num_programs = min(num_tiles, _num_multiprocessors(weight.device))
    return Launch(
        kernel=head_gemm_fwd_kernel,
        num_programs=num_programs,
        arguments={
            "hidden_ptr": hidden_rows,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "target_ids_ptr": target_ids,
            "offsets_ptr": offsets,
            "maxima_ptr": row_sums.maxima,
            "sums_ptr": row_sums.sums,
            "target_logits_ptr": row_sums.target_logits,
            "exps_ptr": exps,
            "R": num_rows,
            "C": num_columns,
            "H": hidden_size,
            "P": row_sums.maxima.shape[1],
            "part_start": part_start,
            "vocab_start": vocab_start,
            "stride_hidden_r": hidden_rows.stride(0),
            "stride_weight_c": weight.stride(0),
            "logit_scale": float(options.logit_scale),
            "HAS_SCALE": options.logit_scale != 1.0,
            "HAS_BIAS": bias is not None,
            "HAS_EXPS": exps is not None,
            "EXP_RANGE": _EXP_RANGE[hidden_rows.dtype],
            "NUM_PROGRAMS": num_programs,
            "GROUP_R": LAUNCH.gemm_group_r,
            "BLOCK_R": LAUNCH.gemm_block_r,
            "BLOCK_V": LAUNCH.gemm_block_v,
            "BLOCK_H": LAUNCH.gemm_block_h,
        },
        num_warps=LAUNCH.gemm_warps,
        num_stages=LAUNCH.gemm_stages,
        platform="cuda",
    )


def allocate_descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel puts the tensor-memory descriptors that it makes; torch's blocks start at 512 bytes' steps."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _num_multiprocessors(device: torch.device) -> int:
    """An H100's where there is no device to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def aot_launches() -> dict[str, Launch]:
    """Every kind of launch that this module makes, by a name that tells what is special about it."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    capped = HeadOptions(logit_scale=0.5, softcap=30.0)
    return {
        "tile": _aot_tile(),
        "tile, stats": _aot_tile(with_stats=True),
        "tile -> bf16": _aot_tile(bf16),
        "tile -> fp16": _aot_tile(fp16),
        "tile -> fp32": _aot_tile(fp32),
        "tile -> bf16, ragged": _aot_tile(bf16, num_columns=1105),  # GPT-2's last: 50257 = 6 * 8192 + 1105 columns
        "tile -> bf16, softcap, stats": _aot_tile(bf16, options=capped, with_stats=True),
        "rows": _aot_rows(bf16, has_gradient=False),
        "rows, stats": _aot_rows(bf16, has_gradient=False, with_stats=True),
        "rows, 1002 parts": _aot_rows(bf16, has_gradient=False, num_parts=1002),
        "rows, bf16": _aot_rows(bf16),
        "rows, fp32, softcap, stats": _aot_rows(fp32, options=capped, with_stats=True),
        "rows backward, bf16": _aot_rows_backward(bf16),
        "rows backward, fp32": _aot_rows_backward(fp32),
        "gemm, bf16": _aot_gemm(with_exps=False),
        "gemm -> bf16": _aot_gemm(with_exps=True),
    }


_AOT_ROWS, _AOT_HIDDEN, _AOT_VOCAB = 1024, 4096, 128256


def _aot_row_sums(num_parts: int = 1, *, with_stats: bool = False) -> RowSums:
    parts = meta(_AOT_ROWS, num_parts)
    return RowSums(parts, parts, meta(_AOT_ROWS), *((parts, parts) if with_stats else (None, None)))


def _aot_tile(
    exps_dtype: torch.dtype | None = None,
    *,
    num_columns: int = LAUNCH.head_columns,
    options: HeadOptions = _PLAIN,
    with_stats: bool = False,
) -> Launch:
    exps = None if exps_dtype is None else meta(_AOT_ROWS, num_columns, dtype=exps_dtype)
    products = None if exps is None else meta(_AOT_ROWS, _AOT_HIDDEN)
    target_ids = meta(_AOT_ROWS, dtype=torch.int64)
    row_sums = _aot_row_sums(with_stats=with_stats)
    return tile_launch(meta(_AOT_ROWS, num_columns), target_ids, row_sums, exps, products, 0, options)


def _aot_rows(
    dtype: torch.dtype,
    *,
    has_gradient: bool = True,
    num_parts: int = 1,
    options: HeadOptions = _PLAIN,
    with_stats: bool = False,
) -> Launch:
    hidden_states = meta(_AOT_ROWS, _AOT_HIDDEN, dtype=dtype)
    results = empty_results(hidden_states, with_stats=with_stats, with_gradient=has_gradient)
    products = zero_products(hidden_states, results)
    weight, target_ids = meta(_AOT_VOCAB, _AOT_HIDDEN, dtype=dtype), meta(_AOT_ROWS, dtype=torch.int64)
    row_sums = _aot_row_sums(num_parts, with_stats=with_stats)
    return rows_forward_launch(row_sums, target_ids, products, weight, results, options)


def _aot_rows_backward(dtype: torch.dtype) -> Launch:
    rows = meta(_AOT_ROWS, _AOT_HIDDEN, dtype=dtype)
    return rows_backward_launch(rows, meta(_AOT_ROWS), meta(_AOT_ROWS), rows)


def _aot_gemm(*, with_exps: bool) -> Launch:
    bf16 = torch.bfloat16
    num_columns = LAUNCH.head_columns if with_exps else _AOT_VOCAB
    return gemm_launch(
        meta(_AOT_ROWS, _AOT_HIDDEN, dtype=bf16),
        meta(num_columns, _AOT_HIDDEN, dtype=bf16),
        None,
        meta(_AOT_ROWS, dtype=torch.int64),
        meta(_AOT_ROWS, 1) if with_exps else None,
        _aot_row_sums(1002),
        meta(_AOT_ROWS, num_columns, dtype=bf16) if with_exps else None,
        part_start=0,
        vocab_start=0,
        options=_PLAIN,
    )
