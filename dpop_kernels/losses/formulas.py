"""Every preference loss, each one function of what is known of a pair: `LOSSES` is their registry.

With Δw = log π(y_w|x) - log π_ref(y_w|x), Δl likewise for the rejected answer, the margin m = Δw - Δl, |y| an
answer's tokens, ℓ(z) = -log σ(z) and DPOP's penalty p = λ · max(0, -Δw - τ):

    dpop        ℓ(β · (m - p))                                 Pal et al. 2024, arXiv:2402.13228, eq. 3 (τ = 0)
    dpo         ℓ(β · m)                                       Rafailov et al. 2023, arXiv:2305.18290, eq. 7
    dpo_norm    ℓ(β · (Δw / |y_w| - Δl / |y_l|))               Lambert et al. 2024, arXiv:2411.15124
    ipo         (m - 1 / (2β))²                                Azar et al. 2023, arXiv:2310.12036, eq. 17 (their τ is β)
    ipo_norm    (Δw / |y_w| - Δl / |y_l| - 1 / (2β))²          the same per token, as TRL has it
    slic        max(0, 1 - β · m)                              Zhao et al. 2023, arXiv:2305.10425, on log-ratios
    robust      ((1-ε) ℓ(β m) - ε ℓ(-β m)) / (1 - 2ε)          Chowdhury et al. 2024, arXiv:2403.00409
    exo_pair    KL((σ(β m), σ(-β m)) || (1-ε, ε))              Ji et al. 2024, arXiv:2402.00856, eq. 16
    nca_pair    ℓ(β Δw) + ℓ(-β Δw) / 2 + ℓ(-β Δl) / 2          Chen et al. 2024, arXiv:2402.05369
    bco_pair    ℓ(β Δw) + ℓ(-β Δl)                             Jung et al. 2024, arXiv:2404.04656, without reward shift
    sppo_hard   (Δw - 1 / (2β))² + (Δl + 1 / (2β))²            Wu et al. 2024, arXiv:2405.00675, eq. 4.7
    apo_zero    σ(-β Δw) + σ(β Δl)                             D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7
    apo_down    σ(β Δw) + σ(-β m)                              the same, eq. 8
    discopop    (1 - s) ℓ(β m) + s exp(-β m), s = σ(β m / τ')  Lu et al. 2024, arXiv:2406.08414, eq. 5
    sft         -log π(y_w|x) / |y_w|                          Pang et al. 2024, arXiv:2404.19733

docs/losses.md tells when to use which. A loss depends on its own pair alone, so that the mean over the pairs of the
global batch is the same whatever the micro-batches and the number of processes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpop_kernels.losses.options import LossOptions
from dpop_kernels.outputs import PairLosses


class PairScores(NamedTuple):
    """What a loss sees of B pairs. All [B], fp32 or fp64."""

    chosen_logps: Tensor
    """log π(y_w|x), summed over the answer's tokens, in nats."""
    rejected_logps: Tensor
    """log π(y_l|x), likewise."""
    chosen_logratios: Tensor
    """Δw, in nats."""
    rejected_logratios: Tensor
    """Δl, in nats."""
    margins: Tensor
    """Δw - Δl from the answers' tails alone: tokens that both begin with cancel exactly. Take this one, not the
    difference of the two above."""
    chosen_lengths: Tensor
    """|y_w| in tokens, at least 1. NaN where only sums are known, and where no loss reads them."""
    rejected_lengths: Tensor
    """|y_l| in tokens, likewise."""


LossFormula = Callable[[PairScores, LossOptions], Tensor]
"""Scores and hyper-parameters to losses [B], differentiable, pair by pair."""


Penalty = Callable[[PairScores, LossOptions], Tensor]
"""What a loss takes off the margin for a chosen answer that became less probable: to nats [B], 0 for no penalty."""

PairKernel = Callable[[Tensor, Tensor, Tensor, LossOptions], PairLosses]
"""The loss straight from token log-probs [N], segment bounds [3B + 1] and reference sums [B, 3], where Triton runs."""


class Loss(NamedTuple):
    """A formula, and what all who use it have to know: whoever asks about a loss asks here and never by its name."""

    formula: LossFormula
    needs_reference: bool
    """Whether it reads log-ratios or margins, and not only log-probs and lengths."""
    reads_lengths: bool
    """Whether it reads the answers' lengths, which are NaN for a loss that does not say so."""
    uses_label_smoothing: bool
    needs_label_smoothing: bool
    """Whether it is defined for ε > 0 alone."""
    penalty: Penalty | None
    """Its penalty on chosen answers, by which metrics, λ's log, the step-0 report and the watch know it."""
    kernel: PairKernel | None


LOSSES: dict[str, Loss] = {}

TRL_NAMES: dict[str, str] = {}
"""TRL's name of a loss, where it is another, to ours."""

DEFAULT_LOSS = "dpop"
PAPER_LOSSES = ("dpo", "ipo", "slic", "dpop")
"""Those that the paper compares (section 6)."""


def register_loss(
    name: str,
    *,
    trl_name: str | None = None,
    needs_reference: bool = True,
    reads_lengths: bool = False,
    uses_label_smoothing: bool = False,
    needs_label_smoothing: bool = False,
    penalty: Penalty | None = None,
    kernel: PairKernel | None = None,
) -> Callable[[LossFormula], LossFormula]:
    """Make a function of (PairScores, LossOptions) a loss that `pair_loss` and the trainer know by name.

    Args:
        name: what `loss_type` is to say.
        trl_name: another name under which it is known.
        needs_reference: False if it reads neither log-ratios nor margins; no reference model is run for it then.
        reads_lengths: whether it reads the answers' lengths.
        uses_label_smoothing: whether it reads `options.label_smoothing`; smoothing that no loss reads is refused.
        needs_label_smoothing: whether it is refused without.
        penalty: what it subtracts where the chosen answer became less probable; λ is `options.dpop_lambda`.
        kernel: the same loss in one launch, for devices that run Triton.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> from dpop_kernels.losses.formulas import LOSSES, register_loss
        >>> @register_loss("squared_margin")
        ... def squared_margin(pair, options):
        ...     return (1 - options.beta * pair.margins).square()
        >>> LOSSES.pop("squared_margin").needs_reference
        True
    """
    for taken in (name, trl_name):
        if taken in LOSSES or taken in TRL_NAMES:
            raise ValueError(f"name: expected a name that no loss has, got {taken!r}. Choose another.")

    def register(formula: LossFormula) -> LossFormula:
        LOSSES[name] = Loss(
            formula,
            needs_reference=needs_reference,
            reads_lengths=reads_lengths,
            uses_label_smoothing=uses_label_smoothing,
            needs_label_smoothing=needs_label_smoothing,
            penalty=penalty,
            kernel=kernel,
        )
        if trl_name is not None:
            TRL_NAMES[trl_name] = name
        return formula

    return register


def dpop_penalties(chosen_logratios: Tensor, dpop_lambda: float, dead_zone: float = 0.0) -> Tensor:
    """λ · max(0, -Δw - τ), with slope 0 at the tie Δw = -τ -> [B]."""
    return dpop_lambda * torch.relu(-chosen_logratios - dead_zone)


def _dpop_penalty(pair: PairScores, options: LossOptions) -> Tensor:
    return dpop_penalties(pair.chosen_logratios, options.dpop_lambda, options.dead_zone)


def _dpop_kernel(token_logps: Tensor, cu_seqlens: Tensor, refs: Tensor, options: LossOptions) -> PairLosses:
    from dpop_kernels.losses.fused import pair_dpop_loss  # needs triton

    return pair_dpop_loss(token_logps, cu_seqlens, refs, options)


def _dpo_kernel(token_logps: Tensor, cu_seqlens: Tensor, refs: Tensor, options: LossOptions) -> PairLosses:
    return _dpop_kernel(token_logps, cu_seqlens, refs, options._replace(dpop_lambda=0.0))


@register_loss("dpop", uses_label_smoothing=True, penalty=_dpop_penalty, kernel=_dpop_kernel)
def dpop(pair: PairScores, options: LossOptions) -> Tensor:
    penalties = _dpop_penalty(pair, options)
    losses = _nll(options.beta * (pair.margins - penalties))
    if options.label_smoothing == 0:
        return losses
    # a wrong label turns the margin round; the penalty is no statement about the preference and stays
    flipped_losses = _nll(options.beta * (-pair.margins - penalties))
    return (1 - options.label_smoothing) * losses + options.label_smoothing * flipped_losses


@register_loss("dpo", trl_name="sigmoid", uses_label_smoothing=True, kernel=_dpo_kernel)
def dpo(pair: PairScores, options: LossOptions) -> Tensor:
    losses = _nll(options.beta * pair.margins)
    if options.label_smoothing == 0:
        return losses
    # Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO"
    flipped_losses = _nll(options.beta * -pair.margins)
    return (1 - options.label_smoothing) * losses + options.label_smoothing * flipped_losses


@register_loss("dpo_norm", trl_name="sigmoid_norm", reads_lengths=True)
def _dpo_norm(pair: PairScores, options: LossOptions) -> Tensor:
    return _nll(options.beta * _margins_per_token(pair))


@register_loss("ipo")
def ipo(pair: PairScores, options: LossOptions) -> Tensor:
    return (pair.margins - 1 / (2 * options.beta)).square()


@register_loss("ipo_norm", reads_lengths=True)
def _ipo_norm(pair: PairScores, options: LossOptions) -> Tensor:
    return (_margins_per_token(pair) - 1 / (2 * options.beta)).square()


@register_loss("slic", trl_name="hinge")
def slic(pair: PairScores, options: LossOptions) -> Tensor:
    return torch.relu(1 - options.beta * pair.margins)


@register_loss("robust", uses_label_smoothing=True)
def _robust(pair: PairScores, options: LossOptions) -> Tensor:
    rewards = options.beta * pair.margins
    noise = options.label_smoothing
    # ℓ(-z) = ℓ(z) + z takes the two terms of the definition together, so that neither cancels the other
    return _nll(rewards) - noise / (1 - 2 * noise) * rewards


@register_loss("exo_pair", uses_label_smoothing=True, needs_label_smoothing=True)
def _exo_pair(pair: PairScores, options: LossOptions) -> Tensor:
    rewards = options.beta * pair.margins
    noise = torch.full_like(rewards, options.label_smoothing)
    chosen = torch.sigmoid(rewards) * (F.logsigmoid(rewards) - torch.log1p(-noise))
    rejected = torch.sigmoid(-rewards) * (F.logsigmoid(-rewards) - torch.log(noise))
    return chosen + rejected


@register_loss("nca_pair")
def _nca_pair(pair: PairScores, options: LossOptions) -> Tensor:
    chosen_rewards, rejected_rewards = _rewards(pair, options)
    return _nll(chosen_rewards) + (_nll(-chosen_rewards) + _nll(-rejected_rewards)) / 2


@register_loss("bco_pair")
def _bco_pair(pair: PairScores, options: LossOptions) -> Tensor:
    chosen_rewards, rejected_rewards = _rewards(pair, options)
    return _nll(chosen_rewards) + _nll(-rejected_rewards)


@register_loss("sppo_hard")
def _sppo_hard(pair: PairScores, options: LossOptions) -> Tensor:
    target = 1 / (2 * options.beta)
    return (pair.chosen_logratios - target).square() + (pair.rejected_logratios + target).square()


@register_loss("apo_zero")
def _apo_zero(pair: PairScores, options: LossOptions) -> Tensor:
    chosen_rewards, rejected_rewards = _rewards(pair, options)
    return torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)


@register_loss("apo_down")
def _apo_down(pair: PairScores, options: LossOptions) -> Tensor:
    chosen_rewards, _ = _rewards(pair, options)
    return torch.sigmoid(chosen_rewards) + torch.sigmoid(-options.beta * pair.margins)


@register_loss("discopop")
def _discopop(pair: PairScores, options: LossOptions) -> Tensor:
    rewards = options.beta * pair.margins
    logistic_share = torch.sigmoid(-rewards / options.discopop_tau)
    # one exponential of the sum: exp(-z) alone overflows where its share vanishes
    exponential = torch.exp(F.logsigmoid(rewards / options.discopop_tau) - rewards)
    return logistic_share * _nll(rewards) + exponential


@register_loss("sft", needs_reference=False, reads_lengths=True)
def _sft(pair: PairScores, options: LossOptions) -> Tensor:
    return -pair.chosen_logps / pair.chosen_lengths


def _nll(z: Tensor) -> Tensor:
    """ℓ(z) = -log σ(z)."""
    return -F.logsigmoid(z)


def _rewards(pair: PairScores, options: LossOptions) -> tuple[Tensor, Tensor]:
    return options.beta * pair.chosen_logratios, options.beta * pair.rejected_logratios


def _margins_per_token(pair: PairScores) -> Tensor:
    return pair.chosen_logratios / pair.chosen_lengths - pair.rejected_logratios / pair.rejected_lengths
