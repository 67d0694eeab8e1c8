"""The definition of every operation in eager PyTorch: short, materialising everything, fp64-capable.

The other backends are held against this one in fp64. Nothing here is written for speed.
"""

import itertools

import torch
from torch import Tensor

from dpop_kernels.backends.protocol import TrainsEntropy
from dpop_kernels.logps.head import Head
from dpop_kernels.outputs import TokenStats
from dpop_kernels.precision import at_least_fp32

RUNS_TRITON = False
TILES = None


def token_logps(
    logits: Tensor,  # [N, V]
    target_ids: Tensor,  # [N]
    *,
    inplace_backward: bool = False,
    with_stats: bool = False,
    trains_entropy: TrainsEntropy = "never",
) -> tuple[Tensor, TokenStats | None]:
    """log softmax(logits)[n, target_ids[n]] -> [N]. `inplace_backward` has nothing to save here and is ignored."""
    logits = at_least_fp32(logits)
    log_probs = logits.log_softmax(dim=-1)
    logps = log_probs.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
    if not with_stats:
        return logps, None
    stats = _token_stats(logits.detach(), log_probs.detach(), target_ids)
    return logps, stats if trains_entropy == "never" else stats._replace(entropy=_entropy(log_probs))


def head_token_logps(
    hidden_states: Tensor,  # [N, H]
    head: Head,
    target_ids: Tensor,  # [N]
    *,
    with_stats: bool = False,
    trains_entropy: TrainsEntropy = "never",
) -> tuple[Tensor, TokenStats | None]:
    """`token_logps` of the head's logits: z = softcap · tanh(scale · (h Wᵀ + a Bᵀ + bias) / softcap)."""
    logits = at_least_fp32(hidden_states) @ at_least_fp32(head.weight).T
    if head.adapter is not None:
        logits = logits + head.adapter.states.to(logits.dtype) @ head.adapter.weight.to(logits.dtype).T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.transform.scale
    if head.transform.softcap is not None:
        logits = torch.tanh(logits / head.transform.softcap) * head.transform.softcap
    return token_logps(logits, target_ids, with_stats=with_stats, trains_entropy=trains_entropy)


def segment_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of token_logps over [cu_seqlens[i], cu_seqlens[i + 1]) -> [S]. Empty segments sum to zero."""
    bounds = cu_seqlens.tolist()
    sums = [token_logps[start:end].sum() for start, end in itertools.pairwise(bounds)]
    return torch.stack(sums) if sums else token_logps.new_zeros(0)


def _entropy(log_probs: Tensor) -> Tensor:
    """p log p with p = 0 is 0, also where the logit is -inf; so is its gradient."""
    finite = torch.where(log_probs > -torch.inf, log_probs, 0)
    return -(log_probs.exp() * finite).sum(-1)


def _token_stats(logits: Tensor, log_probs: Tensor, target_ids: Tensor) -> TokenStats:
    target_logits = logits.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
    return TokenStats(
        _entropy(log_probs),
        logits.mean(-1),
        target_logits >= logits.max(-1).values,
        torch.logsumexp(2 * log_probs, dim=-1),
    )
