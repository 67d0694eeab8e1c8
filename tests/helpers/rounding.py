"""How far rounding may move a number: where the bounds of the tests come from.

Three kinds, and no fourth:

*Equal algorithms* (layouts, accumulation, ranks, a reference that is cached) are compared in fp64, where the same
numbers computed in another order differ by 1e-16 times a condition number of at most 1e6: `EQUAL` is far from both
that and any real fault.

*Guarantees*: storing a number in a shorter type moves it by at most u, its unit roundoff, and so a vector by at most u
of its norm, whatever the machine: `stored`.

*Estimates* of computing in fp32: n roundings of size u·m that are independent and centred add up to u·m·√n, and to
six times that in one case of a thousand million (Higham & Mary 2019, Theorem 3.1). `HeadBounds` follows them through
the head for the very inputs of a test; ordinary inputs are held to the contract (below). `make portability` sees that
no estimate is nearer than a factor of three to what happens, on each kind of arithmetic that the processor can be told
to do.
"""

import torch

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIGMAS = 6.0

EQUAL = 1e-10
"""Relative difference of equal algorithms in fp64."""

CONTRACT_NATS = 1e-5
"""Error of one log-prob against fp64 on the same inputs: 170 units in fp32, so 28 after the factor of six, which is
what √H·|z| roundings come to for logits |z| up to 8 over H = 64 (larger ones belong to confident tokens, where the
errors of logit and normaliser cancel). Inputs beyond that are held to `HeadBounds`."""

GRADIENT = 1e-5
"""Relative error of a gradient, in the norm: 170 units, for sums over up to some thousand columns (√V = 32 to 64) of
terms whose relative error is a logit's absolute one."""

TWO_ROADS_NATS = 3e-5
"""Difference of one logit or log-prob between two roads in fp32 from the same model: ours within the contract, and
eager's, whose log-softmax rounds logits and normalisers of up to 64 nats to 4e-6 each, within two of it."""

MODEL_GRADIENT = 1e-4
"""Relative error of a parameter's gradient through a whole small model in fp32, against the same model in fp32: both
paths err by √L times what one layer's products do, and norms and softmax in front of them multiply by up to ten."""

SUM = 2e-5
"""Error in nats of the sum over an answer of up to some 16 tokens: most are ordinary (δz = u √H |z| = 8e-7 for H = 48
and |z| = 2), and six times √16 of that is 2e-5."""


class Guarantee(float):
    """A bound that no arithmetic can exceed, however near it comes: `make portability` asks no distance of it."""

    def __mul__(self, factor):
        return Guarantee(float(self) * float(factor))

    __rmul__ = __mul__

    def __repr__(self):
        return f"Guarantee({float(self)!r})"


def stored(dtype, *, times=1, cut=False):
    """A guarantee: the relative error in the norm of a result of fp32 that was rounded to `dtype` so many times.

    Triton's interpreter cuts off what a GPU rounds to bf16 (`cut`): an error of up to one last place, not half of one.
    """
    return Guarantee(times * (2 if cut else 1) * UNIT[dtype] + GRADIENT)


def sum_of(num_terms, magnitude, dtype=torch.float32):
    """An estimate: the error of a sum of terms whose partial sums are of the given magnitude."""
    return SIGMAS * UNIT[dtype] * num_terms**0.5 * magnitude


class HeadBounds:
    """Estimates for log-probs and their gradient, from fp64 values of the inputs, each row by itself.

        δz      = u √(H (z² + Σ (h w)²) / 3)                      the products' partial sums drift to z and wander
        δlogp²  = Σ_v (onehot - p)² δz² + u² (logp² + (z_y - max)² + 16)
        δgrad²  = Σ_v (onehot - p)² (δz + u (|z - max| + 4))² |W_v|² + u² V (|grad|² + Σ_v (onehot - p)² |W_v|²) / 3

    Args:
        hidden_states: [N, H].
        weight: [V, H].
        target_ids: [N].
        bias: [V] or None.
        logit_scale: as the head takes it.
        softcap: as the head takes it.
    """

    def __init__(self, hidden_states, weight, target_ids, *, bias=None, logit_scale=1.0, softcap=None):
        u = UNIT[torch.float32]
        hidden_states, weight = hidden_states.detach().double(), weight.detach().double()
        num_tokens, hidden_size = hidden_states.shape
        raw = hidden_states @ weight.T
        wander = hidden_states.square() @ weight.square().T
        if bias is not None:
            raw = raw + bias.detach().double()
        z = logit_scale * raw
        slope = torch.full_like(z, logit_scale)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
            slope = slope * (1 - (z / softcap).square())
        finite = torch.isfinite(z)
        z = torch.where(finite, z, 0)
        rounded = (hidden_size * (raw.square() + wander) / 3).sqrt() * slope.abs() + 4 * z.abs()
        rounded = u * torch.where(finite, rounded, 0)
        masked = torch.where(finite, z, -torch.inf)
        largest = masked.amax(-1, keepdim=True)
        c = -masked.softmax(-1)
        rows = torch.arange(num_tokens, device=z.device)
        others = c.clone()
        others[rows, target_ids] = 0
        c[rows, target_ids] = -others.sum(-1)  # 1 - p without a difference
        logps = masked.log_softmax(-1)[rows, target_ids]
        below = (z - largest)[rows, target_ids]
        variance = (c.square() * rounded.square()).sum(-1) + u**2 * (logps.square() + below.square() + 16)
        self.logps = SIGMAS * variance.sqrt()
        """[N] nats."""
        lengths = weight.square().sum(-1)
        grads = (c * slope) @ weight
        of_terms = ((c * slope).square() * (rounded + u * ((z - largest).abs() + 4)).square()) @ lengths
        walk = (c * slope).square() @ lengths
        of_sums = u**2 * weight.shape[0] * (grads.square().sum(-1) + walk) / 3
        self.rows = SIGMAS * (of_terms + of_sums).sqrt()
        """[N] norms of the errors of d logp[n] / d hidden_states[n]."""
        self._lengths = grads.norm(dim=-1)

    def gradient(self, grad_logps):
        """Relative error in the norm of the hidden states' gradient, for a given output gradient [N]."""
        weights = grad_logps.double().abs()
        return float((weights * self.rows).norm() / (weights * self._lengths).norm())


def worst(error, bound):
    """The largest error in units of its bound; NaN is never within one."""
    return float((error.double().abs() / bound).max())
