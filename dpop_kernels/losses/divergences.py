"""f-divergences between policy and reference: what a log-ratio x = log π(y|x) - log π_ref(y|x) is worth to a loss.

A policy that maximises reward under a penalty f(π / π_ref) has the reward β · f'(π / π_ref) plus what depends on the
prompt alone (Wang et al. 2023, arXiv:2309.16240; f' without its constant). With t = exp(x):

    reverse_kl        f' = log t                       x, so that the score is the log-ratio: DPO's own
    forward_kl        f' = 1 - 1 / t                   1 - exp(-x)
    js_divergence     f' = log(2 t / (1 + t))          log 2 + log σ(x)
    alpha_divergence  f' = (t^a - 1) / a, a = α - 1    (exp(a x) - 1) / a; α → 1 is reverse_kl, α = 0 forward_kl

As in TRL 1.16, but for exponents that overflow: beyond 30, a ratio of 1e13, the exponential goes on along its tangent,
so that a far pair is still pulled back and its loss stays finite.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_EXPONENT = 30.0

REVERSE_KL = "reverse_kl"


def _reverse_kl(logratios: Tensor, alpha: float) -> Tensor:
    return logratios


def _forward_kl(logratios: Tensor, alpha: float) -> Tensor:
    return -_expm1(-logratios)


def _js_divergence(logratios: Tensor, alpha: float) -> Tensor:
    return math.log(2) + F.logsigmoid(logratios)


def _alpha_divergence(logratios: Tensor, alpha: float) -> Tensor:
    exponent = alpha - 1
    return logratios if exponent == 0 else _expm1(exponent * logratios) / exponent


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    REVERSE_KL: _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
"""By TRL's name: log-ratios in nats and α to scores f' of the same shape."""

NEEDS_ALPHA = ("alpha_divergence",)
"""Those that read α."""


def is_reverse_kl(divergence: str, alpha: float) -> bool:
    """Whether scores are the log-ratios themselves, so that margins may be taken from the answers' tails alone."""
    return divergence == REVERSE_KL or (divergence in NEEDS_ALPHA and alpha == 1)


def _expm1(exponents: Tensor) -> Tensor:
    """exp(x) - 1, to the last place about 0; beyond the largest exponent along the tangent."""
    slope = math.exp(_LARGEST_EXPONENT)
    return torch.expm1(exponents.clamp(max=_LARGEST_EXPONENT)) + slope * torch.relu(exponents - _LARGEST_EXPONENT)
