"""Bounded memory in plain torch, on any device: the same algorithm as the kernels, cache-sized group by group.

A tile's rows are handled in groups of about one megabyte, so that the five element-wise passes of a softmax find their
data in the cache and the temporaries stay small. The target's own term is kept out of the sum: with S' the sum of the
other exponentials, 1 - p = S' / (S' + e_y) and log p = -log1p(S' / e_y) keep their relative accuracy at any p.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends import linear_tiles
from dpop_kernels.backends.linear_tiles import HeadOptions
from dpop_kernels.outputs import TokenStats
from dpop_kernels.precision import at_least_fp32

# 1 MiB of fp32: half of a server core's L2, so a group and one temporary stay there.
GROUP_ELEMENTS = 1 << 18

RUNS_TRITON = False

_PLAIN = HeadOptions()


def token_logps(
    logits: Tensor,  # [N, V]
    target_ids: Tensor,  # [N]
    *,
    inplace_backward: bool = False,
    with_stats: bool = False,
) -> tuple[Tensor, TokenStats | None]:
    """log softmax(logits)[n, target_ids[n]] -> [N]; temporaries of about 2 MiB whatever N and V."""
    logps, *stats = _TokenLogps.apply(logits, target_ids.long(), inplace_backward, with_stats)
    return logps, TokenStats(*stats) if with_stats else None


def linear_token_logps(
    hidden_states: Tensor,  # [N, H]
    lm_head_weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_stats: bool = False,
) -> tuple[Tensor, TokenStats | None]:
    """`token_logps` of the head's logits, one tile at a time (see `linear_tiles`)."""
    return linear_tiles.linear_token_logps(
        _ChunkedTileOps(),
        hidden_states,
        lm_head_weight,
        target_ids,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        with_stats=with_stats,
    )


def segment_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of token_logps over [cu_seqlens[i], cu_seqlens[i + 1]) -> [S], accumulated in fp64 in token order."""
    return _SegmentSums.apply(token_logps, cu_seqlens.long())


def tile_forward(
    tile: Tensor,  # [R, V] raw logits in fp32 or better, R > 0
    target_ids: Tensor,  # [R]
    options: HeadOptions = _PLAIN,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor, TokenStats | None]:
    """Log-probs [R] in the tile's dtype, log-normaliser of z [R] fp64, statistics. Not differentiable."""
    logps = tile.new_empty(tile.shape[0])
    lse = tile.new_empty(tile.shape[0], dtype=torch.float64)
    stats = []
    for group in _groups(*tile.shape):
        rows = _rows(_transform(tile[group], options), target_ids[group], with_stats)
        logps[group], lse[group] = rows.logps, rows.lse
        stats.append(rows.stats)
    return logps, lse, _cat_stats(stats) if with_stats else None


def tile_backward(
    tile: Tensor,  # [R, C] raw logits, columns vocab_start and on of the vocabulary
    target_ids: Tensor,  # [R], counted in the whole vocabulary
    logps: Tensor,  # [R]
    lse: Tensor,  # [R] of the whole vocabulary, fp64
    grad_logps: Tensor,  # [R]
    options: HeadOptions = _PLAIN,
    *,
    vocab_start: int = 0,
    out: Tensor,  # [R, C]; may be the tile
) -> Tensor:
    """grad_logps · d logps / d tile, written to `out` and returned."""
    for group in _groups(*tile.shape):
        z = _transform(tile[group], options)
        grads = _softmax_gradient(
            z, target_ids[group] - vocab_start, logps[group], lse[group], grad_logps[group].unsqueeze(-1)
        )
        out[group] = _apply_slope(grads, z, options)
    return out


class _Rows(NamedTuple):
    """What one group of rows yields on the way to its log-probs."""

    logps: Tensor  # [R]
    lse: Tensor  # [R] fp64: at |z| = 1e4 fp32 would be off by 5e-4 nat
    exps: Tensor  # [R, V] exp(z - max) with the target's own entry set to zero
    others: Tensor  # [R] their sum S'
    total: Tensor  # [R] S' + e_y
    stats: TokenStats | None


def _rows(z: Tensor, target_ids: Tensor, with_stats: bool) -> _Rows:
    targets = target_ids.unsqueeze(-1)
    target_logits = z.gather(-1, targets).squeeze(-1)
    maxima = z.amax(dim=-1)
    exps = (z - maxima.unsqueeze(-1)).exp_()
    target_exps = exps.gather(-1, targets).squeeze(-1)
    exps.scatter_(-1, targets, 0.0)
    others = exps.sum(dim=-1)
    total = others + target_exps
    is_top1 = target_logits >= maxima
    # for the row's largest logit e_y is 1; elsewhere log p <= -log 2 and nothing cancels
    logps = torch.where(is_top1, -torch.log1p(others), target_logits - maxima - total.log())
    stats = None
    if with_stats:
        # entropy = lse - Σ p z, about the maximum so that the two terms are small; 0 · -inf counts as 0
        centred = (z - maxima.unsqueeze(-1)).masked_fill_(exps == 0, 0.0)
        own = torch.where(target_exps > 0, (target_logits - maxima) * target_exps, 0.0)
        mean_z = (torch.einsum("rv,rv->r", exps, centred) + own) / total
        stats = TokenStats(total.log() - mean_z, z.mean(dim=-1), is_top1)
    return _Rows(logps, maxima.double() + total.log(), exps, others, total, stats)


def _groups(num_rows: int, num_columns: int) -> Iterator[slice]:
    size = max(1, GROUP_ELEMENTS // max(1, num_columns))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _transform(u: Tensor, options: HeadOptions) -> Tensor:
    """Raw logits -> z = softcap · tanh(logit_scale · u / softcap), in fp32 or better."""
    z = at_least_fp32(u)
    if options.softcap is not None:
        return torch.tanh(z * (options.logit_scale / options.softcap)).mul_(options.softcap)
    return z if options.logit_scale == 1.0 else z * options.logit_scale


def _apply_slope(grads: Tensor, z: Tensor, options: HeadOptions) -> Tensor:
    """grads · dz/du, in place. dz/du = logit_scale · (1 - (z / softcap)²)."""
    if options.softcap is not None:
        grads.mul_((z / options.softcap).square_().neg_().add_(1.0))
    return grads if options.logit_scale == 1.0 else grads.mul_(options.logit_scale)


class _ChunkedTileOps:
    """`linear_tiles.TileOps` in torch."""

    def forward(self, tile, target_ids, options, with_stats):
        return tile_forward(tile, target_ids, options, with_stats)

    def forward_gradient(self, tile, target_ids, options, with_stats, out):
        logps, stats = [], []
        for group in _groups(*tile.shape):
            z = _transform(tile[group], options)
            rows = _rows(z, target_ids[group], with_stats)
            grads = rows.exps.mul_(-1.0 / rows.total.unsqueeze(-1))
            grads.scatter_(-1, target_ids[group].unsqueeze(-1), (rows.others / rows.total).unsqueeze(-1))
            out[group] = _apply_slope(grads, z, options)
            logps.append(rows.logps)
            stats.append(rows.stats)
        return torch.cat(logps), _cat_stats(stats) if with_stats else None

    def block_gradient(self, tile, target_ids, logps, lse, grad_logps, options, vocab_start, out):
        tile_backward(tile, target_ids, logps, lse, grad_logps, options, vocab_start=vocab_start, out=out)


def _softmax_gradient(z: Tensor, target_ids: Tensor, logps: Tensor, lse: Tensor, grad_logps: Tensor) -> Tensor:
    """grad_logps · (onehot - exp(z - lse)) [R, C]; a target outside [0, C) has no column here."""
    num_columns = z.shape[-1]
    lse_high = lse.to(z.dtype)
    lse_low = (lse - lse_high).to(z.dtype)
    grads = (z - lse_high.unsqueeze(-1)).sub_(lse_low.unsqueeze(-1)).exp_().mul_(-grad_logps)
    inside = ((target_ids >= 0) & (target_ids < num_columns)).unsqueeze(-1)
    targets = target_ids.clamp(0, num_columns - 1).unsqueeze(-1)
    own = -torch.expm1(logps).unsqueeze(-1) * grad_logps  # (1 - p) without a difference
    grads.scatter_(-1, targets, torch.where(inside, own, grads.gather(-1, targets)))
    return grads


def _cat_stats(stats: list[TokenStats]) -> TokenStats:
    return TokenStats(*(torch.cat(parts) for parts in zip(*stats, strict=True)))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, inplace_backward, with_stats):
        num_rows = logits.shape[0]
        logps = logits.new_empty(num_rows, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        lse = torch.empty_like(logps, dtype=torch.float64)
        stats = ()
        if with_stats:
            stats = (torch.empty_like(logps), torch.empty_like(logps), torch.empty_like(logps, dtype=torch.bool))
        for group in _groups(*logits.shape):
            rows = _rows(at_least_fp32(logits[group]), target_ids[group], with_stats)
            logps[group], lse[group] = rows.logps, rows.lse
            if rows.stats is not None:
                for whole, part in zip(stats, rows.stats, strict=True):
                    whole[group] = part
        ctx.save_for_backward(logits, target_ids, logps, lse)
        ctx.inplace_backward = inplace_backward
        ctx.mark_non_differentiable(*stats)
        return logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        logits, target_ids, logps, lse = ctx.saved_tensors
        grad_logits = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        for group in _groups(*logits.shape):
            weights = grad_logps[group].unsqueeze(-1)
            grads = _softmax_gradient(
                at_least_fp32(logits[group]), target_ids[group], logps[group], lse[group], weights
            )
            # an unscored row has weight zero: its gradient is zero even where its logits are not finite
            grad_logits[group] = grads.masked_fill_(weights == 0, 0.0)
        return grad_logits, None, None, None


class _SegmentSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps, cu_seqlens):
        ctx.save_for_backward(cu_seqlens)
        ctx.num_tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype
        # the tokens before the first and after the last segment are segments of their own, and left out
        lengths = torch.cat([cu_seqlens[:1], cu_seqlens.diff(), token_logps.shape[0] - cu_seqlens[-1:]])
        sums = torch.segment_reduce(token_logps.double(), "sum", lengths=lengths, unsafe=True, initial=0.0)[1:-1]
        return sums.to(token_logps.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums):
        (cu_seqlens,) = ctx.saved_tensors
        positions = torch.arange(ctx.num_tokens, device=cu_seqlens.device)
        segments = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        inside = (segments >= 0) & (segments < grad_sums.shape[0])
        if grad_sums.shape[0] == 0:
            return grad_sums.new_zeros(ctx.num_tokens), None
        return torch.where(inside, grad_sums[segments.clamp(0, grad_sums.shape[0] - 1)], 0.0), None
