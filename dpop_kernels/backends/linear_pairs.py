"""Hidden states x trainable head -> reduced pair loss in three products: the gradient is formed where the logits are.

A pair's loss and its slopes are known once all of its rows have their log-probs. Tiles therefore hold whole pairs:

    tile        h Wᵀ + bias for the scored rows of some pairs, log-probs, sums, losses, slopes     product 1
                d loss / d tile over the tile itself
                grad_hidden of its rows, grad_weight += tileᵀ h                                    products 2 and 3
    backward    multiplies what is there by the incoming scalar

`linear_tiles` and `fused_linear` take four: they learn the rows' factors in the backward and make the logits again.
A backend brings the arithmetic within a tile, its `tile_forward`, `tile_backward` and `segment_sums`; the caller brings
the loss as a function of the sums.

W's gradient sums over tiles. In fp32 and fp64 it is its own accumulator. In bf16 an accumulator would be a second
[V, H] of 4 bytes per entry, and reading and writing it would take longer than the product that is saved for tiles of
under about 900 rows (8·V·H bytes at 3 TB/s against 2·R·V·H FLOP at 700 TFLOP/s): there is one tile or none, and each
block of W's gradient is one product, rounded once. In fp16 there is none: a loss scale comes with the incoming scalar,
too late for entries that were rounded to zero.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.linear_tiles import HeadOptions, tile_shape
from dpop_kernels.backends.products import chunks, matmul, matmul_add, product_dtype, raw_logits
from dpop_kernels.losses.on_sums import Reduction, reduce_losses
from dpop_kernels.precision import accumulator_dtype

LossesOfSums = Callable[[Tensor, slice], Tensor]
"""Sums [P, 2] of the log-probs of chosen and rejected answers, and which pairs they are, to losses [P]. Differentiable
in the sums, and pair by pair: a loss depends on its own two sums alone."""


class PairTile(NamedTuple):
    """Consecutive pairs whose logits are in memory together."""

    pairs: slice
    rows: slice
    """Their rows of the packed hidden states."""


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


def plan_tiles(hidden_states: Tensor, weight: Tensor, pair_lengths: Sequence[int]) -> list[PairTile] | None:
    """The tiles for a trainable head, or None where the four products of `linear_token_logps` serve better."""
    if hidden_states.dtype == torch.float16:
        return None
    tiles = pack_pairs(pair_lengths, _tile_rows(hidden_states, weight))
    keeps_own_sum = weight.dtype == accumulator_dtype(weight)
    return tiles if keeps_own_sum or (tiles is not None and len(tiles) == 1) else None


def linear_pair_loss(
    backend: Any,
    hidden_states: Tensor,  # [N, H], pair by pair: chosen rows, then rejected rows
    weight: Tensor,  # [V, H], dtype of hidden_states
    target_ids: Tensor,  # [N]
    cu_seqlens: Tensor,  # [2B + 1], bounds of the answers within the N rows
    *,
    tiles: list[PairTile],
    losses_of_sums: LossesOfSums,
    reduction: Reduction,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The reduced loss, differentiable in hidden states, weight and bias -> scalar in fp32 (fp64 for fp64).

    The gradients are there from the forward on: [V, H] and [N, H] in the inputs' dtype, kept until the backward, which
    makes its results beside them.
    """
    assert reduction in ("mean", "sum"), "one scalar must be all that the backward brings"
    return _LinearPairLoss.apply(
        hidden_states,
        weight,
        bias,
        target_ids.long(),
        cu_seqlens,
        backend,
        tiles,
        losses_of_sums,
        reduction,
        HeadOptions(logit_scale, softcap),
    )


class _Gradients(NamedTuple):
    """None where not needed."""

    hidden_states: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V] fp32 or better


class _LinearPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_states,
        weight,
        bias,
        target_ids,
        cu_seqlens,
        backend,
        tiles,
        losses_of_sums,
        reduction,
        options,
    ):
        acc_dtype = accumulator_dtype(hidden_states)
        num_pairs = tiles[-1].pairs.stop
        tile_rows = max(rows.stop - rows.start for _, rows in tiles)
        grads = _empty_gradients(hidden_states, weight, bias, ctx.needs_input_grad)
        losses = hidden_states.new_empty(num_pairs, dtype=acc_dtype)
        buffer = hidden_states.new_empty(tile_rows, weight.shape[0], dtype=acc_dtype)
        for pairs, rows in tiles:
            hidden_rows, ids = hidden_states[rows], target_ids[rows]
            tile = buffer[: hidden_rows.shape[0]]
            raw_logits(hidden_rows, weight, bias, block_columns=tile_shape(weight).block_columns, out=tile)
            logps, lse, _ = backend.tile_forward(tile, ids, options)
            bounds = cu_seqlens[2 * pairs.start : 2 * pairs.stop + 1] - rows.start
            sums = backend.segment_sums(logps, bounds).view(-1, 2)
            losses[pairs], slopes = _losses_and_slopes(losses_of_sums, sums, pairs)
            if reduction == "mean":
                slopes = slopes / num_pairs
            grad_logps = slopes.flatten().repeat_interleave(bounds.diff(), output_size=tile.shape[0])
            _add_gradients(grads, backend, tile, hidden_rows, weight, (ids, logps, lse, grad_logps), options, rows)
        ctx.save_for_backward(*grads)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return reduce_losses(losses, reduction)

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


def _tile_rows(hidden_states: Tensor, weight: Tensor) -> int:
    """Rows of logits that are in memory together. On a GPU their bytes may be those of W in fp32, that is up to H rows:
    whoever trains W has a gradient and an optimiser's moments of that size anyway, and 4096 rows are one product."""
    num_bytes = tile_shape(hidden_states).row_tile_bytes
    if hidden_states.is_cuda:
        num_bytes = max(num_bytes, weight.numel() * torch.float32.itemsize)
    return num_bytes // (weight.shape[0] * accumulator_dtype(hidden_states).itemsize)


def _empty_gradients(hidden_states, weight, bias, needs_input_grad) -> _Gradients:
    needs_hidden, needs_weight, needs_bias = needs_input_grad[:3]
    return _Gradients(
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if needs_hidden else None,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None,
        torch.zeros_like(bias, dtype=accumulator_dtype(bias)) if needs_bias else None,
    )


def _losses_and_slopes(losses_of_sums: LossesOfSums, sums: Tensor, pairs: slice) -> tuple[Tensor, Tensor]:
    """Losses [P] and d loss / d sums [P, 2], by autograd on these few numbers: no loss is written a second time."""
    with torch.enable_grad():
        leaf = sums.detach().requires_grad_()
        losses = losses_of_sums(leaf, pairs)
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), slopes


def _add_gradients(
    grads: _Gradients,  # in and out
    backend: Any,
    tile: Tensor,  # [R, V] raw logits, overwritten
    hidden_rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    row_values: tuple[Tensor, Tensor, Tensor, Tensor],  # [R] each: target_ids, logps, lse, grad_logps
    options: HeadOptions,
    rows: slice,
) -> None:
    """The gradients of one tile. Where the products take another dtype than the tile's, a block of columns at a time:
    the 16-bit gradient of the logits, or W in fp32, is then a block and never whole."""
    dtype = product_dtype(hidden_rows)
    in_place = dtype == tile.dtype
    vocab_size = weight.shape[0]
    block_columns = vocab_size if weight.dtype == tile.dtype else min(vocab_size, tile_shape(weight).block_columns)
    grad_buffer = tile if in_place else tile.new_empty(tile.shape[0] * block_columns, dtype=dtype)
    factors = hidden_rows.to(dtype)
    grad_hidden = None if grads.hidden_states is None else hidden_rows.new_zeros(hidden_rows.shape, dtype=tile.dtype)
    for columns in chunks(vocab_size, block_columns):
        logits = tile[:, columns]
        weight_block = weight[columns].to(dtype)
        grad_tile = logits if in_place else grad_buffer[: logits.numel()].view(logits.shape)
        backend.tile_backward(logits, *row_values, options, vocab_start=columns.start, out=grad_tile)
        if grads.bias is not None:
            grads.bias[columns] += grad_tile.sum(dim=0, dtype=tile.dtype)
        if grad_hidden is not None:
            matmul_add(grad_hidden, grad_tile, weight_block)
        if grads.weight is not None:
            total = grads.weight[columns]
            if rows.start == 0:
                matmul(grad_tile.T, factors, out=total)
            else:
                matmul_add(total, grad_tile.T, factors)
    if grads.hidden_states is not None and grad_hidden is not None:
        grads.hidden_states[rows] = grad_hidden


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · scale, multiplied in scale's precision; the saved gradient stays as it is, for a graph that is retained.

    By blocks of rows: what torch widens on the way is then a block. A scale of one dimension, unlike a scalar, is not
    rounded to 16 bits first.
    """
    scaled = torch.empty_like(grad, dtype=dtype)
    for rows in chunks(grad.shape[0], tile_shape(grad).block_columns):
        torch.mul(grad[rows], scale.view(1), out=scaled[rows])
    return scaled
