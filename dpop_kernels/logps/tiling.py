"""Hidden states x head -> token log-probs: the one walk over tiles of the logits, forward and backward.

    no gradient        rows outer, columns inner: logits, running sums                                     1 product
    frozen head        the same, and Σ exps · W                                                            2 products
                       backward scales the rows
    anything of the    forward as without gradient; backward with columns outer, rows inner: logits again,
    head trainable     their gradient, its products                                                        4 products
                       (3 with an adapter, whose W is frozen)

A token's gradient is g · (1 - p) · (slope · W[y] - Σ exps · W / S), and the loss contributes g alone: with a frozen
head all else is known when the forward holds a tile, in a slice of the vocabulary too (`slices`). W's gradient needs g
beside every entry of a tile: hence the recomputation. Columns are its outer loop, so that a block of W's gradient is
finished before the next begins and its fp32 accumulator is a block and not a second [V, H].

An entropy that is trained on, dH/dz = -p (log p + H), is a second term of the recomputed tiles' gradient: no product
more where they are made anyhow, two with a frozen head. Whether it is trained on, only the backward knows.

The backend brings the arithmetic within a tile (`backends.protocol.TileOps`) and the tiles' bounds.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.bounds import TileBounds
from dpop_kernels.backends.products import chunks, matmul, matmul_add, product_dtype, raw_logits, row_blocks
from dpop_kernels.backends.protocol import EntropyGrads, RowResults, RowSums, TileOps, TrainsEntropy
from dpop_kernels.logps.head import Head, Shard
from dpop_kernels.logps.slices import SliceGradient, combine_slices
from dpop_kernels.outputs import TokenStats
from dpop_kernels.precision import accumulator_dtype


def tiled_token_logps(
    ops: TileOps,
    hidden_states: Tensor,
    head: Head,
    target_ids: Tensor,
    *,
    with_stats: bool = False,
    trains_entropy: TrainsEntropy = "never",
) -> tuple[Tensor, TokenStats | None]:
    """[N, H], [N] -> log-probs [N] in fp32 (fp64 for fp64), statistics. Differentiable in the head's tensors too.

    A weight of another dtype than the hidden states' is rounded to it, and its gradient is not.

    Raises:
        ValueError: on the CPU, a target id belongs to no rank's slice, or to several.
    """
    assert with_stats or trains_entropy == "never", "the entropy is one of the statistics"
    vocab_start = 0 if head.shard is None else head.shard.vocab_start
    local_ids = target_ids.long().contiguous() - vocab_start
    rest = head.with_tensors(hidden_states.new_empty(0), None, None, None)
    logps, *stats = _TiledTokenLogps.apply(
        hidden_states, *head.tensors(), local_ids, rest, ops, with_stats, trains_entropy, torch.is_grad_enabled()
    )
    return logps, TokenStats(*stats) if with_stats else None


class _TiledTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_states,
        weight,
        bias,
        states,
        low_rank_weight,
        local_ids,
        rest,
        ops,
        with_stats,
        trains_entropy,
        grad_enabled,
    ):
        head = rest.with_tensors(weight.to(hidden_states.dtype), bias, states, low_rank_weight)
        needs_hidden, *needs_head = (grad_enabled and needed for needed in ctx.needs_input_grad[:5])
        is_frozen = head.adapter is None and not any(needs_head)
        saves_gradient = needs_hidden and is_frozen and trains_entropy != "always"
        results = RowResults.empty(
            hidden_states,
            accumulator_dtype(hidden_states),
            with_stats=with_stats,
            with_gradient=saves_gradient,
            with_largest=with_stats and head.shard is not None,
        )
        token_ids = token_factors = frozen_weight = None  # of a slice's gradient
        if head.shard is None:
            _forward(ops, hidden_states, head, local_ids, results)
            logps, lse, stats = results.logps, results.lse, results.stats
            unit_grads, unit_factors = results.unit_grads, results.other_mass
        else:
            # a target of another slice: the normaliser does not depend on it, and its log-prob is not used
            owned = (local_ids >= 0) & (local_ids < weight.shape[0])
            slice_ids = torch.where(owned, local_ids, 0)
            _forward(ops, hidden_states, head, slice_ids, results)
            combined = combine_slices(results, owned, weight.shape[0], head.shard.process_group)
            logps, lse, stats = combined.logps, combined.lse, combined.stats
            unit_grads = unit_factors = None
            if saves_gradient:
                part = SliceGradient.of(results, combined, slice_ids, owned, head)
                unit_grads, unit_factors, token_ids, token_factors, frozen_weight = (*part, weight)
        entropies = None if stats is None or trains_entropy == "never" else stats.entropy
        if saves_gradient and entropies is None:
            ctx.save_for_backward(unit_factors, unit_grads, token_ids, token_factors, frozen_weight)
        elif needs_hidden or any(needs_head):
            tensors = (hidden_states, weight, bias, states, low_rank_weight, local_ids, logps, lse, entropies)
            ctx.save_for_backward(unit_factors, unit_grads, token_ids, token_factors, frozen_weight, *tensors)
        ctx.ops, ctx.rest = ops, rest
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(values for values in stats or () if values is not entropies))
        return logps, *(stats or ())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropies=None, *_):
        no_grads = (None,) * 6
        if grad_logps is None and grad_entropies is None:
            return *(None,) * 5, *no_grads
        unit_factors, unit_grads, token_ids, token_factors, frozen_weight, *recomputed_from = ctx.saved_tensors
        shard = ctx.rest.shard
        if grad_entropies is None and unit_grads is not None:
            if shard is None:
                grad_hidden = torch.empty_like(unit_grads)
                ctx.ops.rows_backward(unit_grads, unit_factors, grad_logps, out=grad_hidden)
            else:
                part = SliceGradient(unit_grads, unit_factors, token_ids, token_factors)
                grad_hidden = _summed(part.times(grad_logps, frozen_weight, ctx.ops), shard).to(unit_grads.dtype)
            return grad_hidden, None, None, None, None, *no_grads
        hidden_states, *tensors, local_ids, logps, lse, entropies = recomputed_from
        head = ctx.rest.with_tensors(*tensors)
        grad_logps = torch.zeros_like(logps) if grad_logps is None else grad_logps.to(logps.dtype).contiguous()
        entropy = None if grad_entropies is None else EntropyGrads(entropies, grad_entropies.to(logps.dtype))
        with torch.autocast(hidden_states.device.type, enabled=False):
            rows = RowValues(local_ids, logps, lse, grad_logps)
            grads = _backward(ctx.ops, hidden_states, head, rows, entropy, ctx.needs_input_grad[:5])
        if shard is not None:
            for grad in (grads.hidden_states, grads.states):
                if grad is not None:
                    _summed(grad, shard)
        rounded = (
            None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, (hidden_states, *tensors), strict=True)
        )
        return *rounded, *no_grads


def _summed(grad: Tensor, shard: Shard) -> Tensor:
    """A slice's part of a gradient, in place -> the whole vocabulary's, where this is asked for."""
    if shard.sum_grad_hidden:
        dist.all_reduce(grad, group=shard.process_group)
    return grad


class RowValues(NamedTuple):
    """What a tile's gradient needs to know of its rows. [N] each."""

    target_ids: Tensor
    logps: Tensor
    lse: Tensor
    grad_logps: Tensor

    def rows(self, rows: slice) -> "RowValues":
        return RowValues(*(values[rows] for values in self))


class HeadGradients(NamedTuple):
    """Gradients, or totals of them, of all rows and columns or of some; None where not needed. In fp32 or better, but
    for a weight's that is rounded once."""

    hidden_states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    states: Tensor | None
    low_rank_weight: Tensor | None

    @classmethod
    def empty(cls, hidden_states: Tensor, head: Head, needs_grad: tuple[bool, ...]) -> "HeadGradients":
        """Zeros to add to, but for the weight's, of which every block is written."""
        dtype = accumulator_dtype(hidden_states)
        _, *others = head.tensors()
        needs_hidden, needs_weight, *needs_others = needs_grad
        hidden, bias, states, low_rank = (
            tensor.new_zeros(tensor.shape, dtype=dtype) if needed and tensor is not None else None
            for tensor, needed in zip((hidden_states, *others), (needs_hidden, *needs_others), strict=True)
        )
        make = torch.empty_like if hidden_states.shape[0] else torch.zeros_like
        weight = make(head.weight, memory_format=torch.contiguous_format) if needs_weight else None
        return cls(hidden, weight, bias, states, low_rank)

    def block(self, rows: slice, columns: slice, weight: Tensor | None) -> "HeadGradients":
        """The totals that a gradient tile adds to; `weight` is this block's, or what sums it."""

        def part(tensor: Tensor | None, where: slice) -> Tensor | None:
            return None if tensor is None else tensor[where]

        return HeadGradients(
            part(self.hidden_states, rows),
            weight,
            part(self.bias, columns),
            part(self.states, rows),
            part(self.low_rank_weight, columns),
        )


class Tiles:
    """The buffers of a walk: one tile of logits, reused, or kept logits of all columns; one of exponentials."""

    def __init__(self, like: Tensor, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
        self._logits = like.new_empty(num_rows * num_columns, dtype=accumulator_dtype(like))
        self._exps: Tensor | None = None
        self._dtype = dtype

    def logits(self, num_rows: int, columns: slice, *, keep: bool = False) -> Tensor:
        """[R, C]. Contiguous; kept ones lie one block of columns after the other."""
        start = num_rows * columns.start if keep else 0
        num_columns = columns.stop - columns.start
        return self._logits[start : start + num_rows * num_columns].view(num_rows, num_columns)

    def exps(self, logits: Tensor) -> Tensor:
        """In the products' dtype; they replace logits of the same."""
        if self._dtype == logits.dtype:
            return logits
        if self._exps is None:
            self._exps = torch.empty_like(self._logits, dtype=self._dtype)
        return self._exps[: logits.numel()].view(logits.shape)


def _forward(ops: TileOps, hidden_states: Tensor, head: Head, target_ids: Tensor, results: RowResults) -> None:
    num_tokens, vocab_size = hidden_states.shape[0], head.weight.shape[0]
    bounds, dtype = ops.tile_bounds(hidden_states.device), product_dtype(hidden_states)
    tiles = Tiles(hidden_states, min(num_tokens, bounds.rows), min(vocab_size, bounds.columns), dtype)
    for rows in row_blocks(num_tokens, bounds.rows):
        seen = head.rows(rows)
        forward_rows(ops, hidden_states[rows].to(dtype), seen, target_ids[rows], results.rows(rows), tiles, bounds)


def forward_rows(
    ops: TileOps,
    hidden_rows: Tensor,  # [R, H] in the products' dtype
    head: Head,
    target_ids: Tensor,  # [R]
    results: RowResults,  # [R], out
    tiles: Tiles,
    bounds: TileBounds,
    *,
    keep_logits: bool = False,
) -> None:
    """All of the vocabulary for one block of rows."""
    num_rows, acc_dtype = hidden_rows.shape[0], results.logps.dtype
    sums = RowSums.empty(num_rows, acc_dtype, hidden_rows.device, with_stats=results.stats is not None)
    products = None
    if results.unit_grads is not None:
        products = hidden_rows.new_zeros(hidden_rows.shape, dtype=acc_dtype)
    for columns in chunks(head.weight.shape[0], bounds.columns):
        block = head.columns(columns, hidden_rows.dtype)
        tile = tiles.logits(num_rows, columns, keep=keep_logits)
        raw_logits(hidden_rows, block, out=tile)
        exps = None if products is None else tiles.exps(tile)
        ops.tile_forward(
            tile, target_ids, sums, head.transform, vocab_start=columns.start, exps=exps, products=products
        )
        if products is not None and exps is not None:
            matmul_add(products, exps, block.weight)
        del block  # a converted one is as large as a tile and more: gone before the next is made
    ops.rows_forward(sums, target_ids, products, head, results, vocab_size=head.weight.shape[0])
    if results.largest is not None:
        torch.maximum(sums.maxima, sums.target_logits, out=results.largest)


def _backward(
    ops: TileOps,
    hidden_states: Tensor,
    head: Head,
    values: RowValues,
    entropy: EntropyGrads | None,
    needs_grad: tuple[bool, ...],
) -> HeadGradients:
    num_tokens, vocab_size = hidden_states.shape[0], head.weight.shape[0]
    bounds, dtype, acc_dtype = ops.tile_bounds(hidden_states.device), product_dtype(hidden_states), values.logps.dtype
    grads = HeadGradients.empty(hidden_states, head, needs_grad)
    head = head._replace(weight=head.weight.to(hidden_states.dtype))
    blocks = row_blocks(num_tokens, bounds.gradient_rows)
    num_rows = max((rows.stop - rows.start for rows in blocks), default=0)
    # an adapter's products take the gradient of the logits as it is, before it is rounded for the others
    tile_dtype = dtype if head.adapter is None else acc_dtype
    num_columns = bounds.gradient_columns(num_rows, vocab_size, tile_dtype.itemsize)
    tiles = Tiles(hidden_states, min(num_tokens, bounds.rows), min(vocab_size, bounds.columns), dtype)
    in_place = tile_dtype == acc_dtype and num_rows <= bounds.rows and num_columns <= bounds.columns
    buffer = None if in_place else hidden_states.new_empty(num_rows * num_columns, dtype=tile_dtype)
    for columns in chunks(vocab_size, num_columns):
        block = head.columns(columns, dtype)
        total = _weight_total(grads.weight, columns, acc_dtype, num_blocks=len(blocks))
        for rows in blocks:
            hidden_rows, seen = hidden_states[rows].to(dtype), block.rows(rows)
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            grad_tile = None if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
            for r in chunks(shape[0], bounds.rows):
                at = slice(rows.start + r.start, rows.start + r.stop)
                row_values, row_entropy = values.rows(at), None if entropy is None else entropy.rows(at)
                for c in chunks(shape[1], bounds.columns):
                    logits = tiles.logits(r.stop - r.start, c)
                    raw_logits(hidden_rows[r], seen.rows(r).columns(c, dtype), out=logits)
                    out = logits if grad_tile is None else grad_tile[r, c]
                    start = columns.start + c.start
                    ops.tile_backward(
                        logits, *row_values, head.transform, vocab_start=start, entropy=row_entropy, out=out
                    )
            if grad_tile is None:
                grad_tile = tiles.logits(shape[0], slice(0, shape[1]))
            add_products(grads.block(rows, columns, total), grad_tile, hidden_rows, seen, is_first=rows.start == 0)
        if grads.weight is not None and total is not None and total.dtype != grads.weight.dtype:
            grads.weight[columns] = total
        block = seen = total = None  # gone before the next are made
    return grads


def _weight_total(weight: Tensor | None, columns: slice, dtype: torch.dtype, *, num_blocks: int) -> Tensor | None:
    """What sums a block of W's gradient: the block itself in fp32, and where it is one product, rounded once."""
    if weight is None or weight.dtype == dtype or num_blocks <= 1:
        return None if weight is None else weight[columns]
    return torch.empty_like(weight[columns], dtype=dtype)


def add_products(totals: HeadGradients, grad_tile: Tensor, hidden_rows: Tensor, block: Head, *, is_first: bool) -> None:
    """Add what a gradient tile [R, C] contributes; W's total is written where it is the first."""
    acc_dtype = accumulator_dtype(grad_tile)
    if totals.bias is not None:
        totals.bias.add_(grad_tile.sum(dim=0, dtype=acc_dtype))
    if block.adapter is not None:
        if totals.states is not None:
            totals.states.addmm_(grad_tile, block.adapter.weight.to(acc_dtype))
        if totals.low_rank_weight is not None:
            totals.low_rank_weight.addmm_(grad_tile.T, block.adapter.states.to(acc_dtype))
    grad_tile = grad_tile.to(hidden_rows.dtype)
    if totals.hidden_states is not None:
        matmul_add(totals.hidden_states, grad_tile, block.weight)
    if totals.weight is not None and is_first:
        matmul(grad_tile.T, hidden_rows, out=totals.weight)
    elif totals.weight is not None:
        matmul_add(totals.weight, grad_tile.T, hidden_rows)
