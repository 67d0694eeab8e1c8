"""Hidden states x head -> token log-probs in Triton and the vendor's matrix products, one L2-sized tile at a time.

    no gradient       tile by tile: logits, running sums                                                     1 product
    frozen head       tile by tile: logits, running sums and exponentials E, E W                             2 products
                      backward scales the rows
    trainable head    forward as without gradient; backward recomputes the logits tile by tile               4 products

All of the vocabulary is done for one block of rows before the next: a block's products E W [R, H] are then the only
accumulator. With the loops the other way round W would be read once and not once per block, but the accumulators of
all rows would travel with every tile of the vocabulary, and memory would not be constant.

The arithmetic is in `kernels.linear_logps`. Matrix products take the inputs' dtype and give fp32; torch's setting
`allow_tf32` applies to fp32 inputs as everywhere.
"""

import functools
from collections.abc import Iterator
from typing import Literal

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.fused_launches import (
    Results,
    RowSums,
    allocate_descriptors,
    ceil_div,
    empty_results,
    gemm_launch,
    product_dtype,
    rows_backward_launch,
    rows_forward_launch,
    tile_launch,
    zero_products,
)
from dpop_kernels.backends.fused_logits import tile_backward
from dpop_kernels.backends.linear_tiles import HeadOptions
from dpop_kernels.kernels.launch import LAUNCH
from dpop_kernels.outputs import TokenStats

Variant = Literal["tiles", "gemm"]
"""How the forward makes logits: the vendor's product into tiles in L2, or one Triton product that uses them up."""


def linear_token_logps(
    hidden_states: Tensor,  # [N, H]
    lm_head_weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_stats: bool = False,
    variant: Variant = "tiles",
) -> tuple[Tensor, TokenStats | None]:
    """Differentiable in hidden states, weight and bias -> log-probs [N] fp32, statistics.

    `variant` is there to be measured. "gemm", for NVIDIA's devices (on an MI300 it spills scalar registers), takes
    contiguous rows of a multiple of 16 bytes and no softcap, and gives no statistics; with a frozen head a row becomes
    NaN whose logits exceed those of the first 8192 columns by over 70 (10 in fp16).
    """
    if variant == "gemm":
        assert softcap is None, "the product that uses up its logits knows no softcap"
        assert not with_stats, "the product that uses up its logits keeps no statistics"
    logps, *stats = _LinearTokenLogps.apply(
        hidden_states,
        lm_head_weight,
        bias,
        target_ids.long().contiguous(),
        HeadOptions(logit_scale, softcap),
        with_stats,
        variant,
        torch.is_grad_enabled(),
    )
    return logps, TokenStats(*stats) if with_stats else None


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, target_ids, options, with_stats, variant, is_grad_enabled):
        needs_hidden, needs_weight, needs_bias = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        ctx.head_is_frozen = not (needs_weight or needs_bias)
        save_gradient = needs_hidden and ctx.head_is_frozen
        forward = _forward_tiles if variant == "tiles" else _forward_gemm
        results = empty_results(hidden_states, with_stats=with_stats, with_gradient=save_gradient)
        forward(hidden_states, weight, bias, target_ids, options, results)
        if save_gradient:
            ctx.save_for_backward(results.unit_grads, results.other_mass)
        elif not ctx.head_is_frozen:
            ctx.save_for_backward(hidden_states, weight, bias, target_ids, results.logps, results.lse)
        ctx.options, ctx.dtype = options, hidden_states.dtype
        stats = () if results.stats is None else tuple(results.stats)
        ctx.mark_non_differentiable(*stats)
        return results.logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        no_grads = (None,) * 5
        if ctx.head_is_frozen:
            unit_grads, other_mass = ctx.saved_tensors
            grad_hidden = torch.empty_like(unit_grads)
            rows_backward_launch(unit_grads, other_mass, grad_logps, grad_hidden).run()
            return grad_hidden.to(ctx.dtype), None, None, *no_grads
        hidden_states, weight, bias, target_ids, logps, lse = ctx.saved_tensors
        with torch.autocast(grad_logps.device.type, enabled=False):
            grads = _backward_trainable(
                hidden_states, weight, bias, target_ids, logps, lse, grad_logps, ctx.options, ctx.needs_input_grad
            )
        return *grads, *no_grads


def _forward_tiles(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    options: HeadOptions,
    results: Results,
) -> None:
    """Fill `results`: a product into an fp32 tile, its exponentials, and with a gradient a product with W."""
    dtype = product_dtype(hidden_states)
    tiles = _Tiles(hidden_states, dtype)
    for rows in _row_blocks(hidden_states.shape[0], LAUNCH.head_rows):
        hidden_rows = hidden_states[rows].to(dtype)
        row_sums = RowSums.empty(hidden_rows.shape[0], 1, weight.device, with_stats=results.stats is not None)
        products = zero_products(hidden_rows, results)
        for columns in _chunks(weight.shape[0], LAUNCH.head_columns):
            weight_tile = weight[columns].to(dtype)
            _tile_forward(
                tiles, hidden_rows, weight_tile, bias, target_ids[rows], row_sums, products, columns.start, options
            )
        rows_forward_launch(row_sums, target_ids[rows], products, weight, results.rows(rows), options).run()


def _forward_gemm(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    options: HeadOptions,
    results: Results,
) -> None:
    """Fill `results` by the product that uses up its own logits. With a gradient the first columns go through a tile,
    which gives each row the maximum that all other exponentials are relative to: products need no rescaling."""
    if weight.is_cuda:
        triton.set_allocator(allocate_descriptors)
    vocab_size = weight.shape[0]
    has_gradient = results.unit_grads is not None
    dtype = product_dtype(hidden_states)
    tiles = _Tiles(hidden_states, dtype)
    for rows in _row_blocks(hidden_states.shape[0], LAUNCH.head_rows if has_gradient else LAUNCH.gemm_rows):
        hidden_rows = hidden_states[rows].to(dtype)
        num_rows = hidden_rows.shape[0]
        products = zero_products(hidden_rows, results)
        start = min(vocab_size, LAUNCH.head_columns) if has_gradient else 0
        part_columns = LAUNCH.gemm_block_v // 2
        num_parts = int(has_gradient) + 2 * ceil_div(vocab_size - start, 2 * part_columns)
        row_sums = RowSums.empty(num_rows, num_parts, weight.device)
        if has_gradient:
            first = row_sums._replace(maxima=row_sums.maxima[:, :1].clone(), sums=row_sums.sums[:, :1].clone())
            weight_tile = weight[:start].to(dtype)
            _tile_forward(tiles, hidden_rows, weight_tile, bias, target_ids[rows], first, products, 0, options)
            row_sums.maxima[:, :1], row_sums.sums[:, :1] = first.maxima, first.sums
            offsets = first.maxima
            step = LAUNCH.head_columns
        else:
            offsets, step = None, max(1, vocab_size)
        for columns in _chunks(vocab_size, step, start):
            weight_columns = weight[columns].to(dtype)
            exps = None if offsets is None else tiles.exps(num_rows, weight_columns.shape[0])
            gemm_launch(
                hidden_rows,
                weight_columns,
                None if bias is None else bias[columns],
                target_ids[rows],
                offsets,
                row_sums,
                exps,
                part_start=int(has_gradient) + (columns.start - start) // part_columns,
                vocab_start=columns.start,
                options=options,
            ).run()
            if products is not None and exps is not None:
                _matmul_add(products, exps, weight_columns)
        rows_forward_launch(row_sums, target_ids[rows], products, weight, results.rows(rows), options).run()


def _tile_forward(
    tiles: "_Tiles",
    hidden_rows: Tensor,  # [R, H]
    weight_tile: Tensor,  # [C, H], columns vocab_start and on
    bias: Tensor | None,  # [V]
    target_ids: Tensor,  # [R]
    row_sums: RowSums,  # in and out
    products: Tensor | None,  # [R, H] in and out
    vocab_start: int,
    options: HeadOptions,
) -> None:
    num_rows, num_columns = hidden_rows.shape[0], weight_tile.shape[0]
    logits = tiles.logits(num_rows, num_columns)
    _raw_logits(hidden_rows, weight_tile, bias, vocab_start, out=logits)
    exps = None if products is None else tiles.exps(num_rows, num_columns)
    tile_launch(logits, target_ids, row_sums, exps, products, vocab_start, options).run()
    if products is not None and exps is not None:
        _matmul_add(products, exps, weight_tile)


def _backward_trainable(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target_ids: Tensor,  # [N]
    logps: Tensor,  # [N]
    lse: Tensor,  # [N]
    grad_logps: Tensor,  # [N]
    options: HeadOptions,
    needs_input_grad: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias. Columns are the outer loop, so that W's gradient is finished block
    by block; up to `grad_rows` tokens it is one product, beyond that a sum in fp32."""
    needs_hidden, needs_weight, needs_bias = needs_input_grad[:3]
    num_tokens, (vocab_size, _) = hidden_states.shape[0], weight.shape
    dtype = product_dtype(hidden_states)
    tiles = _Tiles(hidden_states, dtype)
    row_blocks = list(_row_blocks(num_tokens, LAUNCH.grad_rows))
    num_columns = _gradient_columns(row_blocks, vocab_size, dtype)
    grad_buffer = _buffer(max((rows.stop - rows.start for rows in row_blocks), default=0) * num_columns, weight, dtype)
    grad_hidden = hidden_states.new_zeros(hidden_states.shape, dtype=torch.float32) if needs_hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    grad_bias = (
        torch.empty_like(bias, memory_format=torch.contiguous_format) if bias is not None and needs_bias else None
    )
    for columns in _chunks(vocab_size, num_columns):
        weight_block = weight[columns].to(dtype)
        grad_weight_sum = _block_sum(grad_weight, columns, num_blocks=len(row_blocks))
        grad_bias_sum = None if grad_bias is None else torch.zeros_like(grad_bias[columns], dtype=torch.float32)
        for rows in row_blocks:
            hidden_rows = hidden_states[rows].to(dtype)
            grads = grad_buffer[: hidden_rows.shape[0] * weight_block.shape[0]].view(-1, weight_block.shape[0])
            for r in _chunks(grads.shape[0], LAUNCH.head_rows):
                n = slice(rows.start + r.start, rows.start + r.stop)
                for c in _chunks(grads.shape[1], LAUNCH.head_columns):
                    vocab_start = columns.start + c.start
                    logits = tiles.logits(r.stop - r.start, c.stop - c.start)
                    _raw_logits(hidden_rows[r], weight_block[c], bias, vocab_start, out=logits)
                    row_values = (target_ids[n], logps[n], lse[n], grad_logps[n])
                    tile_backward(logits, *row_values, options, vocab_start=vocab_start, out=grads[r, c])
            if grad_bias_sum is not None:
                grad_bias_sum += grads.sum(dim=0, dtype=torch.float32)
            if grad_hidden is not None:
                _matmul_add(grad_hidden[rows], grads, weight_block)
            if grad_weight_sum is not None:
                _matmul_add(grad_weight_sum, grads.T, hidden_rows)
            elif grad_weight is not None:
                _matmul(grads.T, hidden_rows, out=grad_weight[columns])
        if grad_weight is not None and grad_weight_sum is not None:
            grad_weight[columns] = grad_weight_sum
        if grad_bias is not None and grad_bias_sum is not None:
            grad_bias[columns] = grad_bias_sum
    return None if grad_hidden is None else grad_hidden.to(hidden_states.dtype), grad_weight, grad_bias


class _Tiles:
    """One buffer of logits and one of exponentials, reused for every tile."""

    def __init__(self, hidden_states: Tensor, dtype: torch.dtype) -> None:
        size = min(hidden_states.shape[0], LAUNCH.head_rows) * LAUNCH.head_columns
        self._logits = _buffer(size, hidden_states, torch.float32)
        self._exps: Tensor | None = None
        self._dtype = dtype

    def logits(self, num_rows: int, num_columns: int) -> Tensor:
        return self._logits[: num_rows * num_columns].view(num_rows, num_columns)

    def exps(self, num_rows: int, num_columns: int) -> Tensor:
        """In the products' dtype; fp32 exponentials replace the logits they are made of."""
        if self._exps is None:
            is_fp32 = self._dtype == torch.float32
            self._exps = self._logits if is_fp32 else _buffer(self._logits.numel(), self._logits, self._dtype)
        return self._exps[: num_rows * num_columns].view(num_rows, num_columns)


def _buffer(size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)


def _raw_logits(hidden_rows: Tensor, weight_tile: Tensor, bias: Tensor | None, vocab_start: int, out: Tensor) -> None:
    """h Wᵀ + bias [R, C] in fp32, never rounded to a shorter dtype."""
    _matmul(hidden_rows, weight_tile.T, out=out)
    if bias is not None:
        out.add_(bias[vocab_start : vocab_start + out.shape[1]])


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif out.dtype == torch.float32:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(left, right))


def _matmul_add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _adds_to_fp32(total.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


@functools.cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Whether this torch adds a 16-bit product to an fp32 total in one call; torch 2.8 refuses the mixed dtypes."""
    total = torch.zeros(16, 16, device=device)
    factor = torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def _row_blocks(num_tokens: int, size: int) -> Iterator[slice]:
    """Blocks of at most `size` rows and about the same number each, so that none is too small to keep W's loads
    hidden; in steps of 128, the height of a product's output block."""
    num_blocks = max(1, ceil_div(num_tokens, size))
    even = 128 * ceil_div(ceil_div(num_tokens, num_blocks), 128)
    return _chunks(num_tokens, min(size, max(1, even)))


def _gradient_columns(row_blocks: list[slice], vocab_size: int, dtype: torch.dtype) -> int:
    """Columns of the gradient tile: what its bytes allow, in whole tiles of logits, at least one."""
    num_rows = max((rows.stop - rows.start for rows in row_blocks), default=1)
    num_tiles = LAUNCH.grad_tile_bytes // (num_rows * dtype.itemsize * LAUNCH.head_columns)
    return min(vocab_size, max(1, num_tiles) * LAUNCH.head_columns)


def _block_sum(grad_weight: Tensor | None, columns: slice, *, num_blocks: int) -> Tensor | None:
    """Zeros to sum a block of W's gradient in; None where one product gives it (no block at all gives zeros)."""
    if grad_weight is None or num_blocks == 1:
        return None
    return torch.zeros_like(grad_weight[columns], dtype=torch.float32)


def _chunks(total: int, size: int, start: int = 0) -> Iterator[slice]:
    return (slice(low, min(low + size, total)) for low in range(start, total, size))
