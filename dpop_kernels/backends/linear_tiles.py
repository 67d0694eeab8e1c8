"""Hidden states x head -> token log-probs in torch, one tile of fp32 logits at a time (`fused_linear` is its like on
Triton's kernels).

The loops over tiles, the matrix products, what is saved for backward. The arithmetic within a tile comes in as
`TileOps`.

    no gradient       rows x V tiles:  logits, log-probs                                       1 product
    frozen head       rows x V tiles:  logits, log-probs, unit gradient, unit gradient x W     2 products
                      backward scales each row by grad_logps[n]
    trainable head    forward as without gradient; backward recomputes the logits in
                      rows x columns tiles from the saved log-normaliser                       4 products

The *unit gradient* of row n is d logp[n] / d (h Wᵀ + bias)[n] = slope · (onehot(y) - softmax(z)): the loss contributes
one factor per row and nothing else, so it can be formed before the loss is known.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.products import (
    chunks,
    matmul,
    matmul_add,
    product_dtype,
    raw_logits,
    weight_blocks,
)
from dpop_kernels.outputs import TokenStats
from dpop_kernels.precision import accumulator_dtype


class HeadOptions(NamedTuple):
    """z = softcap · tanh(logit_scale · u / softcap) for the raw logits u = h Wᵀ + bias."""

    logit_scale: float = 1.0
    softcap: float | None = None


class TileOps(Protocol):
    """The arithmetic on one tile of raw logits u. Tiles are fp32 (fp64 for fp64 input) and may be overwritten."""

    def forward(
        self, tile: Tensor, target_ids: Tensor, options: HeadOptions, with_stats: bool
    ) -> tuple[Tensor, Tensor, TokenStats | None]:
        """[R, V] -> log-probs [R], log-normaliser of z [R] fp64, statistics."""
        ...

    def forward_gradient(
        self, tile: Tensor, target_ids: Tensor, options: HeadOptions, with_stats: bool, out: Tensor
    ) -> tuple[Tensor, TokenStats | None]:
        """[R, V] -> log-probs [R], statistics; the unit gradient goes to `out` (which may be the tile itself)."""
        ...

    def block_gradient(
        self,
        tile: Tensor,
        target_ids: Tensor,
        logps: Tensor,
        lse: Tensor,
        grad_logps: Tensor,
        options: HeadOptions,
        vocab_start: int,
        out: Tensor,
    ) -> None:
        """[R, C], columns vocab_start and on of the logits -> grad_logps · unit gradient, to `out`."""
        ...


@dataclass(frozen=True)
class TileShape:
    """Bounds of the workspace."""

    row_tile_bytes: int
    """A tile of whole rows, fp32: as many rows as fit (at least one)."""
    block_rows: int
    """Rows of a backward tile with a trainable head."""
    block_columns: int
    """Its columns, and the columns of W that are converted at a time where the product cannot take W's dtype."""


# 64 MiB keeps the whole call under 128 MiB on a CPU (the second half: cache-sized temporaries and grad buffers) and
# still gives 128 rows per product at V = 131072. Blocks of 512 x 4096 (8 MiB) keep the products compute-bound.
CPU_TILES = TileShape(row_tile_bytes=64 << 20, block_rows=512, block_columns=4096)
# Chosen by arithmetic, not yet by measurement: 256 MiB is 512 rows at V = 131072, two waves of 128 x 256 output tiles
# on 132 multiprocessors, and with the 16-bit gradient tile stays under 512 MiB.
GPU_TILES = TileShape(row_tile_bytes=256 << 20, block_rows=2048, block_columns=16384)


def linear_token_logps(
    ops: TileOps,
    hidden_states: Tensor,  # [N, H]
    lm_head_weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [N]
    *,
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    with_stats: bool,
) -> tuple[Tensor, TokenStats | None]:
    """Differentiable in hidden states, weight and bias -> log-probs [N] fp32 (fp64 for fp64), statistics."""
    options = HeadOptions(logit_scale, softcap)
    save_gradient = torch.is_grad_enabled()
    logps, *stats = _LinearTokenLogps.apply(
        hidden_states, lm_head_weight, bias, target_ids.long(), ops, options, with_stats, save_gradient
    )
    return logps, TokenStats(*stats) if with_stats else None


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, target_ids, ops, options, with_stats, save_gradient):
        needs_hidden, needs_weight, needs_bias = (save_gradient and needed for needed in ctx.needs_input_grad[:3])
        head_is_frozen = not (needs_weight or needs_bias)
        if needs_hidden and head_is_frozen:
            logps, stats, unit_grad = _forward_frozen(ops, hidden_states, weight, bias, target_ids, options, with_stats)
            ctx.save_for_backward(unit_grad)
        else:
            logps, stats, lse = _forward(ops, hidden_states, weight, bias, target_ids, options, with_stats)
            if needs_weight or needs_bias:
                ctx.save_for_backward(hidden_states, weight, bias, target_ids, logps, lse)
        ctx.ops, ctx.options, ctx.head_is_frozen = ops, options, head_is_frozen
        ctx.mark_non_differentiable(*stats)
        return logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        no_grads = (None,) * 5
        if ctx.head_is_frozen:
            (unit_grad,) = ctx.saved_tensors
            grad_hidden = (unit_grad * grad_logps.unsqueeze(-1)).to(unit_grad.dtype)
            return grad_hidden, None, None, *no_grads
        hidden_states, weight, bias, target_ids, logps, lse = ctx.saved_tensors
        with torch.autocast(hidden_states.device.type, enabled=False):
            grads = _backward_trainable(
                ctx.ops,
                hidden_states,
                weight,
                bias,
                target_ids,
                logps,
                lse,
                grad_logps,
                ctx.options,
                ctx.needs_input_grad[:3],
            )
        return *grads, *no_grads


def _forward(ops, hidden_states, weight, bias, target_ids, options, with_stats):
    """-> logps [N], (entropy, mean_logit, is_top1) or (), lse [N] fp64."""
    acc_dtype = accumulator_dtype(hidden_states)
    num_tokens = hidden_states.shape[0]
    logps = hidden_states.new_empty(num_tokens, dtype=acc_dtype)
    lse = hidden_states.new_empty(num_tokens, dtype=torch.float64)
    stats = _empty_stats(logps) if with_stats else ()
    tile_buffer = _row_tile(hidden_states, weight, acc_dtype)
    for rows in chunks(num_tokens, tile_buffer.shape[0]):
        tile = tile_buffer[: rows.stop - rows.start]
        raw_logits(hidden_states[rows], weight, bias, block_columns=CPU_TILES.block_columns, out=tile)
        logps[rows], lse[rows], tile_stats = ops.forward(tile, target_ids[rows], options, with_stats)
        _store_stats(stats, rows, tile_stats)
    return logps, stats, lse


def _forward_frozen(ops, hidden_states, weight, bias, target_ids, options, with_stats):
    """-> logps [N], (entropy, mean_logit, is_top1) or (), unit gradient x W [N, H] in the hidden states' dtype."""
    acc_dtype = accumulator_dtype(hidden_states)
    num_tokens = hidden_states.shape[0]
    logps = hidden_states.new_empty(num_tokens, dtype=acc_dtype)
    stats = _empty_stats(logps) if with_stats else ()
    unit_grad = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    tile_buffer = _row_tile(hidden_states, weight, acc_dtype)
    takes_product_dtype = product_dtype(hidden_states) != acc_dtype
    grad_buffer = tile_buffer.new_empty(tile_buffer.shape, dtype=hidden_states.dtype) if takes_product_dtype else None
    for rows in chunks(num_tokens, tile_buffer.shape[0]):
        num_rows = rows.stop - rows.start
        tile = tile_buffer[:num_rows]
        raw_logits(hidden_states[rows], weight, bias, block_columns=CPU_TILES.block_columns, out=tile)
        grad_tile = tile if grad_buffer is None else grad_buffer[:num_rows]
        logps[rows], tile_stats = ops.forward_gradient(tile, target_ids[rows], options, with_stats, out=grad_tile)
        _store_stats(stats, rows, tile_stats)
        _times_weight(grad_tile, weight, out=unit_grad[rows])
    return logps, stats, unit_grad


def _backward_trainable(
    ops, hidden_states, weight, bias, target_ids, logps, lse, grad_logps, options, needs_input_grad
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias; every sum over tiles is kept in fp32 or better.

    Columns are the outer loop: one block of W's gradient is finished before the next begins, so its fp32 accumulator
    is a block and not a second [V, H].
    """
    needs_hidden, needs_weight, needs_bias = needs_input_grad
    acc_dtype = logps.dtype
    num_tokens, (vocab_size, _) = hidden_states.shape[0], weight.shape
    tiles = tile_shape(hidden_states)
    dtype = product_dtype(hidden_states)
    grad_hidden = hidden_states.new_zeros(hidden_states.shape, dtype=acc_dtype) if needs_hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    grad_bias = torch.empty_like(bias) if needs_bias else None
    grad_logps = grad_logps.to(acc_dtype).contiguous()
    tile_buffer = hidden_states.new_empty(min(tiles.block_rows, num_tokens), tiles.block_columns, dtype=acc_dtype)
    for columns in chunks(vocab_size, tiles.block_columns):
        num_columns = columns.stop - columns.start
        weight_block = weight[columns].to(dtype)
        bias_block = None if bias is None else bias[columns]
        grad_weight_block = weight_block.new_zeros(weight_block.shape, dtype=acc_dtype) if needs_weight else None
        grad_bias_block = hidden_states.new_zeros(num_columns, dtype=acc_dtype) if needs_bias else None
        for rows in chunks(num_tokens, tiles.block_rows):
            tile = tile_buffer.view(-1)[: (rows.stop - rows.start) * num_columns].view(-1, num_columns)
            hidden_rows = hidden_states[rows].to(dtype)
            matmul(hidden_rows, weight_block.T, out=tile)
            if bias_block is not None:
                tile.add_(bias_block)
            ops.block_gradient(
                tile, target_ids[rows], logps[rows], lse[rows], grad_logps[rows], options, columns.start, out=tile
            )
            if grad_bias_block is not None:
                grad_bias_block += tile.sum(dim=0)
            grad_tile = tile.to(dtype)
            if grad_hidden is not None:
                matmul_add(grad_hidden[rows], grad_tile, weight_block)
            if grad_weight_block is not None:
                matmul_add(grad_weight_block, grad_tile.T, hidden_rows)
        if grad_weight is not None and grad_weight_block is not None:
            grad_weight[columns] = grad_weight_block
        if grad_bias is not None and grad_bias_block is not None:
            grad_bias[columns] = grad_bias_block
    return None if grad_hidden is None else grad_hidden.to(hidden_states.dtype), grad_weight, grad_bias


def _times_weight(grad_tile: Tensor, weight: Tensor, out: Tensor) -> None:
    """[R, V] x [V, H] -> [R, H], accumulated in fp32 or better and rounded once, to out's dtype."""
    if grad_tile.dtype == weight.dtype == out.dtype:
        torch.mm(grad_tile, weight, out=out)
        return
    total = grad_tile.new_zeros(out.shape)
    for columns in weight_blocks(weight, grad_tile.dtype, CPU_TILES.block_columns):
        total.addmm_(grad_tile[:, columns], weight[columns].to(grad_tile.dtype))
    out.copy_(total)


def tile_shape(hidden_states: Tensor) -> TileShape:
    """The bounds on the device of the hidden states."""
    return GPU_TILES if hidden_states.is_cuda else CPU_TILES


def _row_tile(hidden_states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    num_tokens, vocab_size = hidden_states.shape[0], weight.shape[0]
    rows = tile_shape(hidden_states).row_tile_bytes // (vocab_size * dtype.itemsize)
    return hidden_states.new_empty(max(1, min(rows, num_tokens)), vocab_size, dtype=dtype)


def _empty_stats(logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(logps), torch.empty_like(logps), torch.empty_like(logps, dtype=torch.bool)


def _store_stats(stats: tuple[Tensor, ...], rows: slice, tile_stats: TokenStats | None) -> None:
    if tile_stats is not None:
        for whole, part in zip(stats, tile_stats, strict=True):
            whole[rows] = part
