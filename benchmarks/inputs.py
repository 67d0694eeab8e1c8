"""Hidden states, heads and logits that are peaked as a language model's are, from a seed.

A benchmark on zeros or plain Gaussian logits flatters whoever skips small probabilities and hides every error at
confident tokens. Here each token's log-odds, log p/(1-p) of its target, are chosen first: evenly spaced from -6 to 16
and then shuffled. So 1 - p runs from 0.998 down to 1e-7; 27 % of the tokens are less likely than not, the median has
p = 0.993, and 41 % have 1 - p below 1e-3. That is what a model sees of text it half knows.

The other logits are N(0, 2²): hidden states are Gaussian with their part along W[y] taken out, and t · W[y] / |W[y]|²
is added, which makes the target's logit t. It also adds N(0, t²/H) to the others, as W's rows are not orthogonal. With
V columns their log-sum-exp is then log V + (4 + t²/H) / 2, and t follows from the log-odds.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import HeadShape

LOWEST_ODDS, HIGHEST_ODDS = -6.0, 16.0
"""Log-odds of the targets, in nats."""
OTHERS = 2.0
"""Standard deviation of the logits of the other columns."""


class HeadInputs(NamedTuple):
    hidden_states: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    target_ids: Tensor
    """[N] int64"""


def head_inputs(head: HeadShape, num_tokens: int, device: torch.device, dtype: torch.dtype, *, seed: int = 0):
    """-> HeadInputs whose logits are peaked; drawn on the device, in `dtype`."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(head.vocab_size, head.hidden_size, device=device, dtype=dtype)
    weight.normal_(0, head.hidden_size**-0.5, generator=generator)
    target_ids = torch.randint(head.vocab_size, (num_tokens,), device=device, generator=generator)
    hidden_states = torch.empty(num_tokens, head.hidden_size, device=device, dtype=dtype)
    lift = target_logits(head, num_tokens, device)[torch.randperm(num_tokens, device=device, generator=generator)]
    for rows in torch.arange(num_tokens, device=device).split(4096):  # the fp32 copies stay small
        own = weight[target_ids[rows]].float()
        noise = torch.randn(own.shape, device=device, generator=generator) * OTHERS
        squares = own.square().sum(-1, keepdim=True)
        along = (noise * own).sum(-1, keepdim=True)
        hidden_states[rows] = (noise + own * ((lift[rows].unsqueeze(-1) - along) / squares)).to(dtype)
    return HeadInputs(hidden_states, weight, target_ids)


def target_logits(head: HeadShape, num_tokens: int, device: torch.device | None = None) -> Tensor:
    """t [N] fp32, the targets' logits before a softcap, for log-odds in rising order.

    From odds = t - log V - (4 + t²/H) / 2; where H is too small for high odds (their t would spread the other logits
    more than it gains) they stop at 0.9 of what can be reached, and a softcapped logit at 0.95 of its cap.
    """
    odds = torch.linspace(LOWEST_ODDS, HIGHEST_ODDS, num_tokens, device=device)
    wanted = (odds + math.log(head.vocab_size) + OTHERS**2 / 2).clamp(max=0.45 * head.hidden_size)
    logits = head.hidden_size * (1 - (1 - 2 * wanted / head.hidden_size).sqrt())
    if head.softcap is None:
        return logits
    return head.softcap * torch.atanh((logits / head.softcap).clamp(max=0.95))


def logits_inputs(vocab_size: int, num_tokens: int, device: torch.device, dtype: torch.dtype, *, seed: int = 0):
    """-> logits [N, V] and target_ids [N] with the same odds, made without a head."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(num_tokens, vocab_size, device=device, dtype=dtype)
    logits.normal_(0, OTHERS, generator=generator)
    target_ids = torch.randint(vocab_size, (num_tokens,), device=device, generator=generator)
    odds = torch.linspace(LOWEST_ODDS, HIGHEST_ODDS, num_tokens, device=device)
    odds = odds[torch.randperm(num_tokens, device=device, generator=generator)]
    own = (odds + math.log(vocab_size) + OTHERS**2 / 2).to(dtype)
    return logits.scatter_(1, target_ids.unsqueeze(-1), own.unsqueeze(-1)), target_ids
