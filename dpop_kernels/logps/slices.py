"""Log-probs within slices of the vocabulary, one on each rank -> those of the whole, in one gather."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def combine_slices(logps: Tensor, lse: Tensor, owned: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
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
