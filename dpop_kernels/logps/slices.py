"""A vocabulary in slices, one on each rank: the values of each -> those of the whole, in one gather.

    q_k = exp(lse_k - lse)      the mass of slice k, of which a rank knows its own W and its own softmax alone

    d logp / d h = [y in k] · W[y] - q_k Σ_v softmax_k(v) W[v], summed over the ranks            slopes dz/du left out

The tiles give d logp_k(t) / d h = (1 - p_k) · unit_grad for a token t of the slice: the target, or any other where the
target is elsewhere. So a rank's part is ([y in k] - q_k) · W[t] + q_k (1 - p_k) · unit_grad, with 1 - q_k from the
other slices' masses: two small terms, and no difference of large ones, where a token is confident.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from dpop_kernels.backends.products import chunks
from dpop_kernels.backends.protocol import RowResults, TileOps
from dpop_kernels.logps.head import Head
from dpop_kernels.outputs import TokenStats
from dpop_kernels.precision import accumulator_dtype


class Combined(NamedTuple):
    """What the slices come to: the same on every rank, but for the masses. [N] each, fp64 but for `logps`, `stats`."""

    logps: Tensor
    lse: Tensor
    stats: TokenStats | None
    mass: Tensor
    """q of this rank's slice."""
    other_mass: Tensor
    """1 - q where the target is in this rank's slice."""


def combine_slices(results: RowResults, owned: Tensor, vocab_size: int, process_group: Any) -> Combined:
    """Log-probs, normalisers and statistics within each slice -> those of the whole vocabulary.

    With d_k = lse_k - lse_owner, log p = log p_owner - log(1 + Σ_{k ≠ owner} exp(d_k)): two terms of one sign, so that
    a confident token's log-prob keeps its relative accuracy. The order of the sum is the order of the ranks.

    Args:
        results: of this rank's slice, with `largest` where there are statistics.
        owned: [N] bool, whether the target is in it.
        vocab_size: rows of this slice.
        process_group: the ranks that have the others.

    Raises:
        ValueError: on the CPU, a target id belongs to no slice, or to several.
    """
    lse, logps, stats = results.lse.double(), results.logps, results.stats
    mine = [lse, torch.where(owned, logps.double(), 0.0), owned.double()]
    if stats is not None and results.largest is not None:
        is_largest = torch.where(owned & stats.is_top1, results.largest.double(), -torch.inf)
        totals = stats.mean_logit.double() * vocab_size
        mine += [stats.entropy.double(), stats.log_sum_sq_probs.double(), results.largest.double(), is_largest]
        mine += [totals, torch.full_like(totals, vocab_size)]
    sent = torch.stack(mine)
    gathered = [torch.empty_like(sent) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, sent, group=process_group)
    lses, owner_logps, owners, *of_stats = torch.stack(gathered).unbind(1)  # each [ranks, N]
    if logps.device.type == "cpu" and not bool((owners.sum(0) == 1).all()):
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
    # an id in no slice has no log-prob; on a GPU that is only seen here
    combined = torch.where(owners.sum(0) == 1, owner_logps.sum(0) - increment, torch.nan)
    whole_lse = owner_lse + increment
    return Combined(
        combined.to(logps.dtype),
        whole_lse,
        _combined_stats(lses - whole_lse, *of_stats, dtype=logps.dtype) if of_stats else None,
        mass=torch.exp(lse - whole_lse),
        other_mass=-torch.expm1(-increment),
    )


def _combined_stats(
    log_masses: Tensor,  # [ranks, N] log q, as all of the following
    entropies: Tensor,
    log_squares: Tensor,
    largest: Tensor,
    target_if_largest: Tensor,  # the target's logit where it is the largest of its slice; -inf
    totals: Tensor,
    sizes: Tensor,
    *,
    dtype: torch.dtype,
) -> TokenStats:
    masses = log_masses.exp()
    within = torch.where(masses > 0, masses * entropies, 0.0)  # a slice of -inf has no entropy
    return TokenStats(
        entropy=(within + torch.special.entr(masses)).sum(0).to(dtype),
        mean_logit=(totals.sum(0) / sizes.sum(0)).to(dtype),
        is_top1=target_if_largest.amax(0) >= largest.amax(0),
        log_sum_sq_probs=(2.0 * log_masses + log_squares).logsumexp(0).to(dtype),
    )


class SliceGradient(NamedTuple):
    """This rank's part of a frozen head's gradient, but for the loss's factor; see the top of the file."""

    unit_grads: Tensor  # [N, H], of W's own size
    unit_factors: Tensor  # [N] q (1 - p)
    token_ids: Tensor  # [N] t
    token_factors: Tensor  # [N] ([y in the slice] - q) · dz/du(t)

    @classmethod
    def of(
        cls, results: RowResults, combined: Combined, token_ids: Tensor, owned: Tensor, head: Head
    ) -> "SliceGradient":
        """
        Args:
            results: of the slice with `token_ids` as targets, and with a gradient.
            combined: what the slices came to.
            token_ids: [N] t.
            owned: [N] bool, whether t is the target.
            head: the slice.
        """
        assert results.other_mass is not None
        assert results.unit_grads is not None
        token_factors = torch.where(owned, combined.other_mass, -combined.mass)
        z = (results.lse + results.logps.double()).to(results.logps.dtype)
        slope = head.transform.times_slope(torch.ones_like(z), z)
        unit_factors = (combined.mass * results.other_mass.double()).to(z.dtype)
        return cls(results.unit_grads, unit_factors, token_ids, token_factors.to(z.dtype) * slope)

    def times(self, grad_logps: Tensor, weight: Tensor, ops: TileOps) -> Tensor:
        """grad_logps · this rank's part [N, H] in fp32 or better; a row of weight zero gets zeros."""
        grads = torch.empty_like(self.unit_grads, dtype=accumulator_dtype(self.unit_grads))
        ops.rows_backward(self.unit_grads, self.unit_factors, grad_logps, out=grads)
        factors = torch.where(grad_logps == 0, 0.0, grad_logps * self.token_factors).unsqueeze(-1)
        for rows in chunks(len(grads), ops.tile_bounds(grads.device).rows):
            grads[rows].addcmul_(weight[self.token_ids[rows]].to(grads.dtype), factors[rows])
        return grads
