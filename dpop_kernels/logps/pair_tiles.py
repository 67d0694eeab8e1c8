"""Hidden states x trainable head -> reduced pair loss in three products: the gradient is formed where the logits are.

A pair's loss and its slopes are known once all of its rows have their log-probs. Tiles therefore hold whole pairs:

    tile        raw logits of the scored rows of some pairs, kept; log-probs, sums, losses, slopes     product 1
                d loss / d logits, a block of columns at a time
                grad_hidden of its rows, grad_weight += gradientᵀ h                                    products 2 and 3
    backward    multiplies what is there by the incoming scalar

The walk of `tiling` alone takes four: it learns the rows' factors in the backward and makes the logits again. The steps
within a tile are its own; the caller brings the loss as a function of the sums.

W's gradient sums over tiles. In fp32 and fp64 it is its own accumulator. In bf16 an accumulator would be a second
[V, H] of 4 bytes per entry, and reading and writing it would take longer than the product that is saved for tiles of
under about 900 rows (8·V·H bytes at 3 TB/s against 2·R·V·H FLOP at 700 TFLOP/s): there is one tile or none, and each
block of W's gradient is one product, rounded once. In fp16 there is none: a loss scale comes with the incoming scalar,
too late for entries that were rounded to zero.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.bounds import TileBounds
from dpop_kernels.backends.products import chunks, product_dtype
from dpop_kernels.backends.protocol import Backend, RowResults, TileOps
from dpop_kernels.logps.head import Head
from dpop_kernels.logps.tiling import HeadGradients, RowValues, Tiles, add_products, forward_rows
from dpop_kernels.precision import accumulator_dtype

LossesOfSums = Callable[[Tensor, slice], Tensor]
"""Sums [P, 2] of the log-probs of chosen and rejected answers, and which pairs they are, to losses [P]. Differentiable
in the sums, and pair by pair: a loss depends on its own two sums alone."""


class PairTile(NamedTuple):
    """Consecutive pairs whose logits are in memory together."""

    pairs: slice
    rows: slice
    """Their rows of the packed hidden states."""

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


def pack_pairs(pair_lengths: Sequence[int], tile_rows: int) -> list[PairTile] | None:
    """Pairs of so many rows, in order, into tiles of at most `tile_rows` rows; None if one pair alone is longer."""
    if max(pair_lengths) > tile_rows:
        return None
    tiles, first_pair, first_row, row = [], 0, 0, 0
    for pair, length in enumerate(pair_lengths):
        if row + length - first_row > tile_rows:
            tiles.append(PairTile(slice(first_pair, pair), slice(first_row, row)))
            first_pair, first_row = pair, row
        row += length
    return [*tiles, PairTile(slice(first_pair, len(pair_lengths)), slice(first_row, row))]


_SCALED_ROWS = 4096


def plan_tiles(
    ops: TileOps, hidden_states: Tensor, weight: Tensor, pair_lengths: Sequence[int]
) -> list[PairTile] | None:
    """The tiles for a trainable head, or None where the four products of `tiled_token_logps` serve better."""
    if hidden_states.dtype == torch.float16:
        return None
    tiles = pack_pairs(pair_lengths, _tile_rows(ops.tile_bounds(hidden_states.device), hidden_states, weight))
    keeps_own_sum = weight.dtype == accumulator_dtype(weight)
    return tiles if keeps_own_sum or (tiles is not None and len(tiles) == 1) else None


def linear_pair_loss(
    backend: Backend,
    hidden_states: Tensor,  # [N, H], pair by pair: chosen rows, then rejected rows
    head: Head,
    target_ids: Tensor,  # [N]
    cu_seqlens: Tensor,  # [2B + 1], bounds of the answers within the N rows
    *,
    tiles: list[PairTile],
    losses_of_sums: LossesOfSums,
    reduction: str,  # "mean" or "sum"
) -> Tensor:
    """The reduced loss, differentiable in hidden states, weight and bias -> scalar in fp32 (fp64 for fp64).

    The gradients are there from the forward on: [V, H] and [N, H] in the inputs' dtype, kept until the backward, which
    makes its results beside them.
    """
    assert reduction in ("mean", "sum"), "one scalar must be all that the backward brings"
    assert head.adapter is None, "a tile of whole pairs is of plain heads"
    assert head.shard is None, "a tile of whole pairs is of whole heads"
    return _LinearPairLoss.apply(
        hidden_states,
        head.weight,
        head.bias,
        target_ids.long(),
        cu_seqlens,
        head.transform,
        backend,
        tiles,
        losses_of_sums,
        reduction,
    )


class _LinearPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_states,
        weight,
        bias,
        target_ids,
        cu_seqlens,
        transform,
        backend,
        tiles,
        losses_of_sums,
        reduction,
    ):
        head, ops = Head(weight, bias, transform), backend.TILES
        acc_dtype, dtype = accumulator_dtype(hidden_states), product_dtype(hidden_states)
        num_pairs = tiles[-1].pairs.stop
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        needs_grad = (False, needs_weight, needs_bias, False, False)
        grads = HeadGradients.empty(hidden_states, head, needs_grad)
        losses = hidden_states.new_empty(num_pairs, dtype=acc_dtype)
        buffers = Tiles(hidden_states, max(tile.num_rows for tile in tiles), weight.shape[0], dtype)
        bounds = ops.tile_bounds(hidden_states.device)
        for tile in tiles:
            hidden_rows, ids = hidden_states[tile.rows].to(dtype), target_ids[tile.rows]
            results = RowResults.empty(hidden_rows, acc_dtype, with_stats=False, with_gradient=False)
            forward_rows(ops, hidden_rows, head, ids, results, buffers, bounds, keep_logits=True)
            segments = cu_seqlens[2 * tile.pairs.start : 2 * tile.pairs.stop + 1] - tile.rows.start
            sums = backend.segment_sums(results.logps, segments).view(-1, 2)
            losses[tile.pairs], slopes = _losses_and_slopes(losses_of_sums, sums, tile.pairs)
            if reduction == "mean":
                slopes = slopes / num_pairs
            grad_logps = slopes.flatten().repeat_interleave(segments.diff(), output_size=tile.num_rows)
            values = RowValues(ids, results.logps, results.lse, grad_logps)
            hidden_total = hidden_rows.new_zeros(hidden_rows.shape, dtype=acc_dtype) if needs_hidden else None
            rows_grads = grads._replace(hidden_states=hidden_total)
            _add_gradients(rows_grads, ops, hidden_rows, head, values, buffers, bounds, is_first=tile.rows.start == 0)
            if grad_hidden is not None and hidden_total is not None:
                grad_hidden[tile.rows] = hidden_total
        ctx.save_for_backward(grad_hidden, grads.weight, grads.bias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return losses.mean() if reduction == "mean" else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else _scaled(grad_hidden, grad_loss, grad_hidden.dtype),
            None if grad_weight is None else _scaled(grad_weight, grad_loss, grad_weight.dtype),
            None if grad_bias is None else _scaled(grad_bias, grad_loss, ctx.bias_dtype),
            *(None,) * 7,
        )


def _tile_rows(bounds: TileBounds, hidden_states: Tensor, weight: Tensor) -> int:
    """Rows of logits that are in memory together. On a GPU their bytes may be those of W in fp32, that is up to H rows:
    whoever trains W has a gradient and an optimiser's moments of that size anyway, and 4096 rows are one product."""
    num_bytes = bounds.pair_bytes
    if hidden_states.is_cuda:
        num_bytes = max(num_bytes, weight.numel() * torch.float32.itemsize)
    return num_bytes // (weight.shape[0] * accumulator_dtype(hidden_states).itemsize)


def _losses_and_slopes(losses_of_sums: LossesOfSums, sums: Tensor, pairs: slice) -> tuple[Tensor, Tensor]:
    """Losses [P] and d loss / d sums [P, 2], by autograd on these few numbers: no loss is written a second time."""
    with torch.enable_grad():
        leaf = sums.detach().requires_grad_()
        losses = losses_of_sums(leaf, pairs)
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), slopes


def _add_gradients(
    grads: HeadGradients,  # in and out
    ops: TileOps,
    hidden_rows: Tensor,  # [R, H] in the products' dtype
    head: Head,
    values: RowValues,  # [R]
    buffers: Tiles,  # with the kept logits, overwritten
    bounds: TileBounds,
    *,
    is_first: bool,
) -> None:
    """The gradients of one tile, a block of columns at a time: a 16-bit gradient of the logits, or W in fp32, is then a
    block and never whole."""
    for columns in chunks(head.weight.shape[0], bounds.columns):
        logits = buffers.logits(hidden_rows.shape[0], columns, keep=True)
        grad_tile = logits
        if hidden_rows.dtype != logits.dtype:
            grad_tile = torch.empty_like(logits, dtype=hidden_rows.dtype)
        ops.tile_backward(logits, *values, head.transform, vocab_start=columns.start, out=grad_tile)
        total = None if grads.weight is None else grads.weight[columns]
        block = head.columns(columns, hidden_rows.dtype)
        add_products(grads.block(slice(None), columns, total), grad_tile, hidden_rows, block, is_first=is_first)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · scale, multiplied in scale's precision; the saved gradient stays as it is, for a graph that is retained.

    By blocks of rows: what torch widens on the way is then a block. A scale of one dimension, unlike a scalar, is not
    rounded to 16 bits first.
    """
    scaled = torch.empty_like(grad, dtype=dtype)
    for rows in chunks(grad.shape[0], _SCALED_ROWS):
        torch.mul(grad[rows], scale.view(1), out=scaled[rows])
    return scaled
