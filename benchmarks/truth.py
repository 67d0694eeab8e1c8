"""fp64 truth on the same inputs, a block of the vocabulary at a time, and errors against it that NaN cannot pass.

The target's own column stays out of the sums, as its 1 - p must: a confident token's 1 - p is a sum, not a difference.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16384
"""Columns of W that are widened to fp64 at once."""


class Truth(NamedTuple):
    """fp64 results of R rows."""

    logps: Tensor
    """[R], in nats."""
    grad_hidden: Tensor
    """[R, H], the gradient of each row's own log-prob."""


@torch.no_grad()
def head_truth(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, *, softcap: float | None = None) -> Truth:
    """Log-probs of [R] rows and the gradient of each with respect to its hidden state [R, H]."""
    hidden_states = hidden_states.double()
    logits, slopes = _logits(hidden_states, weight, softcap)
    own = target_ids.unsqueeze(-1)
    own_slope = slopes.gather(1, own)
    distances = (logits - logits.gather(1, own)).scatter_(1, own, -torch.inf)
    log_others = distances.logsumexp(dim=1)  # log of (1 - p) / p
    others = (distances - log_others.unsqueeze(-1)).exp() * slopes  # softmax over the others, sums to 1 without slopes
    parts = zip(others.split(BLOCK, dim=1), weight.split(BLOCK), strict=True)
    average = sum(part @ block.double() for part, block in parts)
    other_mass = torch.sigmoid(log_others).unsqueeze(-1)
    own_row = own_slope * weight[target_ids].double()
    return Truth(-torch.nn.functional.softplus(log_others), other_mass * (own_row - average))


@torch.no_grad()
def grad_weight_truth(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [N]
    grad_logps: Tensor,  # [N]
    columns: Tensor,  # [C] distinct rows of W
    *,
    softcap: float | None = None,
) -> Tensor:
    """Rows `columns` of the weight's gradient [C, H], from all N tokens."""
    gradient = torch.zeros(len(columns), weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in torch.arange(len(target_ids), device=weight.device).split(512):
        wide = hidden_states[rows].double()
        logits, slopes = _logits(wide, weight, softcap)
        probs = (logits[:, columns] - logits.logsumexp(dim=1, keepdim=True)).exp()
        factors = ((target_ids[rows].unsqueeze(-1) == columns).double() - probs) * slopes[:, columns]
        gradient += (factors * grad_logps[rows].double().unsqueeze(-1)).T @ wide
    return gradient


@torch.no_grad()
def logits_truth(logits: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of [R] rows of logits [R, V] and their gradients [R, V], fp64."""
    wide = logits.double()
    own = target_ids.unsqueeze(-1)
    distances = (wide - wide.gather(1, own)).scatter_(1, own, -torch.inf)
    log_others = distances.logsumexp(dim=1)
    other_mass = torch.sigmoid(log_others).unsqueeze(-1)
    gradient = -other_mass * (distances - log_others.unsqueeze(-1)).exp()
    return -torch.nn.functional.softplus(log_others), gradient.scatter_(1, own, other_mass)


def largest(errors: Tensor) -> float:
    """NaN is the largest of all: `max` alone would hand it on, and no comparison with a bound would notice."""
    return float(torch.where(errors.isnan(), torch.inf, errors).max())


def worst_row(candidate: Tensor, truth: Tensor) -> float:
    """Largest |candidate - truth| / |truth| over rows [R, ·], of those whose truth is not zero."""
    sizes = truth.norm(dim=1)
    return largest(((candidate.double() - truth).norm(dim=1) / sizes)[sizes > 0])


def relative(candidate: Tensor, truth: Tensor) -> float:
    """|candidate - truth| / |truth| of the whole; infinite for NaN."""
    return largest(((candidate.double() - truth).norm() / truth.norm()).unsqueeze(0))


def sample_rows(num_rows: int, num_checked: int, device: torch.device) -> Tensor:
    """Row numbers [R] spread evenly over all rows, the first and the last among them."""
    return torch.linspace(0, num_rows - 1, min(num_checked, num_rows), device=device).long().unique()


def _logits(hidden_states: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """fp64 logits [R, V] and their slopes by the product h · W (1 without a softcap)."""
    products = torch.cat([hidden_states @ block.double().T for block in weight.split(BLOCK)], dim=1)
    if softcap is None:
        return products, torch.ones_like(products)
    tangents = torch.tanh(products / softcap)
    return softcap * tangents, 1 - tangents.square()
