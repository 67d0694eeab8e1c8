"""Bounded memory in plain torch, on any device: the same algorithm as the kernels, cache-sized group by group."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpop_kernels.backends import chunked_tiles
from dpop_kernels.backends.chunked_tiles import groups, rows_forward, softmax_gradient, tile_forward
from dpop_kernels.backends.protocol import RowResults, RowSums
from dpop_kernels.logps.head import PLAIN
from dpop_kernels.outputs import TokenStats
from dpop_kernels.precision import accumulator_dtype, at_least_fp32

RUNS_TRITON = False
TILES = chunked_tiles


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


def segment_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of token_logps over [cu_seqlens[i], cu_seqlens[i + 1]) -> [S], accumulated in fp64 in token order."""
    return _SegmentSums.apply(token_logps, cu_seqlens.long())


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, inplace_backward, with_stats):
        dtype = accumulator_dtype(logits)
        results = RowResults.empty(logits, dtype, with_stats=with_stats, with_gradient=False)
        for rows in groups(*logits.shape):
            # a tile of its own: its exponentials are made in place
            tile = logits[rows].to(dtype, copy=True)
            sums = RowSums.empty(tile.shape[0], dtype, tile.device, with_stats=with_stats)
            tile_forward(tile, target_ids[rows], sums, PLAIN, exps=tile)
            rows_forward(sums, target_ids[rows], None, None, results.rows(rows), vocab_size=logits.shape[1])
        ctx.save_for_backward(logits, target_ids, results.logps, results.lse)
        ctx.inplace_backward = inplace_backward
        stats = () if results.stats is None else tuple(results.stats)
        ctx.mark_non_differentiable(*stats)
        return results.logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        logits, target_ids, logps, lse = ctx.saved_tensors
        grad_logits = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        for rows in groups(*logits.shape):
            weights = grad_logps[rows].unsqueeze(-1)
            grads = softmax_gradient(at_least_fp32(logits[rows]), target_ids[rows], logps[rows], lse[rows], weights)
            # an unscored row has weight zero: its gradient is zero even where its logits are not finite
            grad_logits[rows] = grads.masked_fill_(weights == 0, 0.0)
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
