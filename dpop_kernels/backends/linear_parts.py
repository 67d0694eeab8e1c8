"""Hidden states x a head in parts -> token log-probs: a low-rank addition to the weight, a slice of the vocabulary.

    u = h Wᵀ + a Bᵀ + bias        W [V, H], B [V, R]: all rows of the head, or those from vocab_start on

    forward     rows x V tiles: logits, log-probs and log-normaliser of this slice of the vocabulary      1 product
                slices meet in one gather of three fp64 values per token and rank
    backward    rows x columns tiles: logits again, the gradients of h and a, those of W and B where needed
                                                                      2 products if W is frozen, 3 if it is not

B's gradient is Σ_n g_n E_nᵀ a_n with the loss's own factor g_n for every row, and a slice's gradient needs the other
slices' normalisers; neither is known while the forward holds a tile, hence the recomputation. The products with a and
B have rank R: they are made in fp32 at the cost of R / H of the others. [W, B] is never put together in memory.

A backend brings the arithmetic within a tile: its `tile_forward` and `tile_backward`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from dpop_kernels.backends.linear_tiles import HeadOptions
from dpop_kernels.backends.products import chunks, matmul_add, product_dtype, raw_logits
from dpop_kernels.outputs import TokenStats
from dpop_kernels.precision import accumulator_dtype

# The bounds of `linear_tiles`, for the same reasons: a tile of whole rows, and a backward tile of rows x columns.
ROW_TILE_BYTES = 64 << 20
BLOCK_ROWS = 512
BLOCK_COLUMNS = 4096


class VocabSlice(NamedTuple):
    """Which rows of the head this rank holds."""

    vocab_start: int = 0
    process_group: Any = None
    """The ranks that hold the other rows; None if there are none."""
    sum_grad_hidden: bool = True
    """Sum the gradients of h and a over the ranks in backward."""


def linear_token_logps(
    backend: Any,
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H], dtype of hidden_states
    target_ids: Tensor,  # [N], counted in the whole vocabulary
    *,
    bias: Tensor | None = None,  # [V]
    low_rank_states: Tensor | None = None,  # [N, R], any floating dtype
    low_rank_weight: Tensor | None = None,  # [V, R], any floating dtype
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_slice: VocabSlice | None = None,
    with_stats: bool = False,
) -> tuple[Tensor, TokenStats | None]:
    """Differentiable in every floating tensor -> log-probs [N] fp32 (fp64 for fp64), statistics of an unsliced head.

    Raises:
        ValueError: on the CPU, a target id belongs to no rank's slice, or to several.
    """
    vocab_slice = vocab_slice or VocabSlice()
    assert not (with_stats and vocab_slice.process_group is not None)
    logps, *stats = _PartsTokenLogps.apply(
        hidden_states,
        weight,
        bias,
        low_rank_states,
        low_rank_weight,
        target_ids.long() - vocab_slice.vocab_start,
        backend,
        HeadOptions(logit_scale, softcap),
        vocab_slice,
        with_stats,
        torch.is_grad_enabled(),
    )
    return logps, TokenStats(*stats) if with_stats else None


class _Head(NamedTuple):
    """The tensors that make u."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    low_rank_states: Tensor | None
    low_rank_weight: Tensor | None

    def logits(self, rows: slice, columns: slice, out: Tensor) -> None:
        """u[rows, columns], accumulated in out's dtype and never rounded to a shorter one."""
        raw_logits(self.hidden_states[rows], self.weight[columns], None, block_columns=BLOCK_COLUMNS, out=out)
        if self.low_rank_states is not None and self.low_rank_weight is not None:
            out.addmm_(self.low_rank_states[rows].to(out.dtype), self.low_rank_weight[columns].to(out.dtype).T)
        if self.bias is not None:
            out.add_(self.bias[columns])


class _HeadGrads(NamedTuple):
    """Their gradients, None where not needed."""

    hidden_states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low_rank_states: Tensor | None
    low_rank_weight: Tensor | None


class _PartsTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_states,
        weight,
        bias,
        low_rank_states,
        low_rank_weight,
        local_ids,
        backend,
        options,
        vocab_slice,
        with_stats,
        save_for_backward,
    ):
        head = _Head(hidden_states, weight, bias, low_rank_states, low_rank_weight)
        logps, lse, stats = _forward(backend, head, local_ids, options, with_stats)
        if vocab_slice.process_group is not None:
            owned = (local_ids >= 0) & (local_ids < weight.shape[0])
            logps, lse = _combine(logps, lse, owned, vocab_slice.process_group)
        if save_for_backward and any(ctx.needs_input_grad):
            ctx.save_for_backward(*head, local_ids, logps, lse)
        ctx.backend, ctx.options, ctx.vocab_slice = backend, options, vocab_slice
        stats = () if stats is None else tuple(stats)
        ctx.mark_non_differentiable(*stats)
        return logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        *head, local_ids, logps, lse = ctx.saved_tensors
        head = _Head(*head)
        with torch.autocast(grad_logps.device.type, enabled=False):
            grads = _backward(
                ctx.backend, head, local_ids, logps, lse, grad_logps, ctx.options, ctx.needs_input_grad[:5]
            )
        if ctx.vocab_slice.process_group is not None and ctx.vocab_slice.sum_grad_hidden:
            for grad in (grads.hidden_states, grads.low_rank_states):
                if grad is not None:
                    dist.all_reduce(grad, group=ctx.vocab_slice.process_group)
        rounded = (
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, head, strict=True)
        )
        return *rounded, *(None,) * 6


def _forward(backend, head, local_ids, options, with_stats) -> tuple[Tensor, Tensor, TokenStats | None]:
    """Log-probs [N] and log-normaliser [N] fp64 within this slice, statistics.

    A target of another slice stands in as column 0: the normaliser does not depend on it, and its log-prob is not used.
    """
    num_tokens, vocab_size = head.hidden_states.shape[0], head.weight.shape[0]
    acc_dtype = accumulator_dtype(head.hidden_states)
    column_ids = torch.where((local_ids >= 0) & (local_ids < vocab_size), local_ids, 0)
    logps = head.hidden_states.new_empty(num_tokens, dtype=acc_dtype)
    lse = head.hidden_states.new_empty(num_tokens, dtype=torch.float64)
    stats = None
    if with_stats:
        stats = TokenStats(torch.empty_like(logps), torch.empty_like(logps), torch.empty_like(logps, dtype=torch.bool))
    tile_rows = max(1, min(ROW_TILE_BYTES // (vocab_size * acc_dtype.itemsize), num_tokens))
    buffer = head.hidden_states.new_empty(tile_rows, vocab_size, dtype=acc_dtype)
    for rows in chunks(num_tokens, tile_rows):
        tile = buffer[: rows.stop - rows.start]
        head.logits(rows, slice(0, vocab_size), out=tile)
        logps[rows], lse[rows], tile_stats = backend.tile_forward(tile, column_ids[rows], options, with_stats)
        if stats is not None:
            for whole, part in zip(stats, tile_stats, strict=True):
                whole[rows] = part
    return logps, lse, stats


def _combine(logps: Tensor, lse: Tensor, owned: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
    """Log-probs and log-normaliser within each slice -> those of the whole vocabulary, equal on every rank.

    With d_k = lse_k - lse_owner, log p = log p_owner - log(1 + Σ_{k ≠ owner} exp(d_k)): two terms of one sign, so that
    a confident token's log-prob keeps its relative accuracy. The order of the sum is the order of the ranks.
    """
    mine = torch.stack([lse.double(), torch.where(owned, logps.double(), 0.0), owned.double()])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, mine, group=process_group)
    lses, owner_logps, owners = torch.stack(gathered).unbind(1)  # each [ranks, N]
    if lse.device.type == "cpu" and not bool((owners.sum(0) == 1).all()):
        token = int((owners.sum(0) != 1).nonzero()[0])
        slices = int(owners[:, token].sum())
        raise ValueError(
            f"target_ids: expected each id in exactly one rank's slice of the vocabulary, got {slices} "
            f"for token {token}. Check vocab_start, and that masked positions (-100) were dropped before the call."
        )
    owner_lse = torch.where(owners > 0, lses, 0.0).sum(0)
    excess = torch.where(owners > 0, -torch.inf, lses - owner_lse)
    largest = excess.amax(0).clamp_min(0.0)
    increment = largest + torch.log1p(torch.expm1(-largest) + (excess - largest).exp().sum(0))
    combined = owner_logps.sum(0) - increment
    # an id in no slice has no log-prob; on a GPU that is only seen here
    return torch.where(owners.sum(0) == 1, combined, torch.nan).to(logps.dtype), owner_lse + increment


def _backward(backend, head, local_ids, logps, lse, grad_logps, options, needs_input_grad) -> _HeadGrads:
    """Gradients of the five tensors; every sum over tiles is kept in fp32 or better.

    Columns are the outer loop: a block of W's gradient is finished before the next begins, so that its fp32
    accumulator is a block and not a second [V, H].
    """
    needs_hidden, needs_weight, needs_bias, needs_states, needs_low_rank = needs_input_grad
    num_tokens, vocab_size = head.hidden_states.shape[0], head.weight.shape[0]
    acc_dtype, dtype = logps.dtype, product_dtype(head.hidden_states)
    grads = _HeadGrads(
        head.hidden_states.new_zeros(head.hidden_states.shape, dtype=acc_dtype) if needs_hidden else None,
        torch.empty_like(head.weight, memory_format=torch.contiguous_format) if needs_weight else None,
        torch.empty_like(head.bias) if needs_bias else None,
        head.low_rank_states.new_zeros(head.low_rank_states.shape, dtype=acc_dtype) if needs_states else None,
        torch.empty_like(head.low_rank_weight, memory_format=torch.contiguous_format) if needs_low_rank else None,
    )
    grad_logps = grad_logps.to(acc_dtype).contiguous()
    buffer = head.hidden_states.new_empty(min(BLOCK_ROWS, num_tokens), min(BLOCK_COLUMNS, vocab_size), dtype=acc_dtype)
    for columns in chunks(vocab_size, BLOCK_COLUMNS):
        num_columns = columns.stop - columns.start
        weight_block = head.weight[columns].to(dtype)
        grad_weight = weight_block.new_zeros(weight_block.shape, dtype=acc_dtype) if needs_weight else None
        grad_bias = weight_block.new_zeros(num_columns, dtype=acc_dtype) if needs_bias else None
        low_rank_block, grad_low_rank = None, None
        if head.low_rank_weight is not None:
            low_rank_block = head.low_rank_weight[columns].to(acc_dtype)
            grad_low_rank = torch.zeros_like(low_rank_block) if needs_low_rank else None
        for rows in chunks(num_tokens, BLOCK_ROWS):
            tile = buffer.view(-1)[: (rows.stop - rows.start) * num_columns].view(-1, num_columns)
            head.logits(rows, columns, out=tile)
            backend.tile_backward(
                tile,
                local_ids[rows],
                logps[rows],
                lse[rows],
                grad_logps[rows],
                options,
                vocab_start=columns.start,
                out=tile,
            )
            if grad_bias is not None:
                grad_bias += tile.sum(dim=0)
            if grads.low_rank_states is not None and low_rank_block is not None:
                grads.low_rank_states[rows].addmm_(tile, low_rank_block)
            if grad_low_rank is not None:
                grad_low_rank.addmm_(tile.T, head.low_rank_states[rows].to(acc_dtype))
            grad_tile = tile.to(dtype)
            if grads.hidden_states is not None:
                matmul_add(grads.hidden_states[rows], grad_tile, weight_block)
            if grad_weight is not None:
                matmul_add(grad_weight, grad_tile.T, head.hidden_states[rows].to(dtype))
        blocks = [(grads.weight, grad_weight), (grads.bias, grad_bias), (grads.low_rank_weight, grad_low_rank)]
        for whole, block in blocks:
            if whole is not None:
                whole[columns] = block
    return grads
