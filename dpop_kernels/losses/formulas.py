"""Every preference loss, each one function of what is known of a pair: `LOSSES` is their registry.

With Δw = log π(y_w|x) - log π_ref(y_w|x), Δl likewise for the rejected answer, the margin m = Δw - Δl, |y| an
answer's tokens, m' = Δw / |y_w| - Δl / |y_l|, ℓ(z) = -log σ(z) and DPOP's penalty p = λ · max(0, -Δw - τ):

    dpop          ℓ(β · (m - p))                               Pal et al. 2024, arXiv:2402.13228, eq. 3 (τ = 0)
    dpop_norm     ℓ(β · (m' - p / |y_w|))                      the same per token
    dpo           ℓ(β · m)                                     Rafailov et al. 2023, arXiv:2305.18290, eq. 7
    dpo_norm      ℓ(β · m')                                    Lambert et al. 2024, arXiv:2411.15124
    ipo           (m - 1 / (2β))²                              Azar et al. 2023, arXiv:2310.12036, eq. 17 (their τ is β)
    ipo_norm      (m' - 1 / (2β))²                             the same per token, as TRL has it
    slic          max(0, 1 - β · m)                            Zhao et al. 2023, arXiv:2305.10425, on log-ratios
    rdpo          ℓ(β · m + α (|y_w| - |y_l|))                 Park et al. 2024, arXiv:2403.19159
    robust        ((1-ε) ℓ(β m) - ε ℓ(-β m)) / (1 - 2ε)        Chowdhury et al. 2024, arXiv:2403.00409
    exo_pair      KL((σ(β m), σ(-β m)) || (1-ε, ε))            Ji et al. 2024, arXiv:2402.00856, eq. 16
    nca_pair      ℓ(β Δw) + ℓ(-β Δw) / 2 + ℓ(-β Δl) / 2        Chen et al. 2024, arXiv:2402.05369
    bco_pair      ℓ(β Δw) + ℓ(-β Δl)                           Jung et al. 2024, arXiv:2404.04656, without reward shift
    sppo_hard     (Δw - 1 / (2β))² + (Δl + 1 / (2β))²          Wu et al. 2024, arXiv:2405.00675, eq. 4.7
    apo_zero      σ(-β Δw) + σ(β Δl)                           D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7
    apo_down      σ(β Δw) + σ(-β m)                            the same, eq. 8
    discopop      (1 - s) ℓ(β m) + s exp(-β m), s = σ(β m/τ')  Lu et al. 2024, arXiv:2406.08414, eq. 5

Without a reference, with a = log π(y|x) / |y| and the log-odds o = a - log(1 - exp(a)) of both answers:

    simpo         ℓ(β · (a_w - a_l) - γ)                       Meng et al. 2024, arXiv:2405.14734, eq. 6
    cpo           ℓ(β · log(π(y_w|x) / π(y_l|x))) - α a_w      Xu et al. 2024, arXiv:2401.08417, eq. 3 and its NLL
    orpo          β · ℓ(o_w - o_l) - a_w                       Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7
    sft           -a_w                                         Pang et al. 2024, arXiv:2404.19733

Over the pairs of a batch, where [i] is the i-th smallest of the batch and g = log π(y_w|x) - log π(y_l|x):

    aot           ℓ(β · (g[i] - g_ref[i]))                     Melnyk et al. 2024, arXiv:2406.05882, paired
    aot_unpaired  ℓ(β · (Δw[i] - Δl[i]))                       the same, unpaired
    beta_dpo      ℓ(β' · m), β' = β (1 + α (mean(m) - M₀))     Wu et al. 2024, arXiv:2407.08639

docs/losses.md tells when to use which. All but those of a batch depend on their own pair alone, so that the mean over
the pairs of the global batch is the same whatever the micro-batches and the number of processes. Under an f-divergence
other than the reverse KL the margins, and what they are made of, are of f'(π / π_ref) instead of log(π / π_ref)
(`divergences`); the penalty stays one on Δw in nats.
"""

from collections.abc import Callable, Sequence
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
    logp_margins: Tensor
    """log π(y_w|x) - log π(y_l|x) from the answers' tails alone: tokens that both begin with cancel exactly. Take this
    one, not the difference of the two above."""
    chosen_logratios: Tensor
    """Δw, in nats."""
    rejected_logratios: Tensor
    """Δl, in nats."""
    chosen_scores: Tensor
    """f'(π / π_ref) of the chosen answer: Δw, unless another divergence than the reverse KL is asked for."""
    rejected_scores: Tensor
    """The same of the rejected answer."""
    margins: Tensor
    """What the chosen answer's score is above the rejected one's: Δw - Δl, from the tails alone."""
    chosen_lengths: Tensor
    """|y_w| in tokens, at least 1. NaN where only sums are known, and where no loss reads them."""
    rejected_lengths: Tensor
    """|y_l| in tokens, likewise."""


LossFormula = Callable[[PairScores, LossOptions], Tensor]
"""Scores and hyper-parameters to losses [B], differentiable; pair by pair, but for those of a batch."""


Penalty = Callable[[PairScores, LossOptions], Tensor]
"""What a loss takes off the margin for a chosen answer that became less probable: to nats [B], 0 for no penalty."""

PairKernel = Callable[[Tensor, Tensor, Tensor, LossOptions], PairLosses]
"""The loss straight from token log-probs [N], segment bounds [3B + 1] and reference sums [B, 3], where Triton runs."""


class Loss(NamedTuple):
    """A formula, and what all who use it have to know: whoever asks about a loss asks here and never by its name."""

    formula: LossFormula
    reads: frozenset[str]
    """The fields of `LossOptions` that it depends on, beside β."""
    needs_reference: bool
    """Whether it reads log-ratios, scores or margins, and not only log-probs and lengths."""
    reads_lengths: bool
    """Whether it reads the answers' lengths, which are NaN for a loss that does not say so."""
    takes_divergence: bool
    """Whether it reads the two answers' scores by their difference alone, in which what depends on the prompt cancels:
    then it is defined for every f-divergence."""
    needs_label_smoothing: bool
    """Whether it is defined for ε > 0 alone."""
    is_of_batch: bool
    """Whether it compares the pairs of a batch with each other: another batch size is another loss, and a value is no
    single pair's."""
    penalty: Penalty | None
    """Its penalty on chosen answers, by which metrics, λ's log, the step-0 report and the watch know it."""
    kernel: PairKernel | None


LOSSES: dict[str, Loss] = {}

TRL_NAMES: dict[str, str] = {}
"""TRL's name of a loss, where it is another, to ours."""

DEFAULT_LOSS = "dpop"
PAPER_LOSSES = ("dpo", "ipo", "slic", "dpop")
"""Those that the paper compares (section 6)."""

_PENALTY_READS = ("dpop_lambda", "dead_zone")
_DIVERGENCE_READS = ("f_divergence_type", "f_alpha_divergence_coef")
_SMALLEST_BETA = 1e-3  # of β-DPO, as its authors have it


def register_loss(
    name: str,
    *,
    trl_name: str | None = None,
    reads: Sequence[str] = (),
    needs_reference: bool = True,
    reads_lengths: bool = False,
    takes_divergence: bool = False,
    needs_label_smoothing: bool = False,
    is_of_batch: bool = False,
    penalty: Penalty | None = None,
    kernel: PairKernel | None = None,
) -> Callable[[LossFormula], LossFormula]:
    """Make a function of (PairScores, LossOptions) a loss that `pair_loss` and the trainer know by name.

    Args:
        name: what `loss_type` is to say.
        trl_name: another name under which it is known.
        reads: the fields of `LossOptions` that it depends on, beside `beta`, those of a penalty and those of a
            divergence. One that is set and that no loss reads is refused.
        needs_reference: False if it reads neither log-ratios nor margins; no reference model is run for it then.
        reads_lengths: whether it reads the answers' lengths.
        takes_divergence: whether it reads `margins`, or the scores by their difference, and log-ratios in its penalty
            alone.
        needs_label_smoothing: whether it is refused without.
        is_of_batch: whether its value depends on the other pairs of the batch.
        penalty: what it subtracts where the chosen answer became less probable; λ is `options.dpop_lambda`.
        kernel: the same loss in one launch, for devices that run Triton.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        ValueError: the name is taken, or something is read that is no option.

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
    unknown = set(reads) - set(LossOptions._fields)
    if unknown:
        raise ValueError(f"reads: expected fields of LossOptions, got {sorted(unknown)}. Add them there.")

    def register(formula: LossFormula) -> LossFormula:
        LOSSES[name] = Loss(
            formula,
            reads=frozenset(
                [*reads, *(_PENALTY_READS if penalty else ()), *(_DIVERGENCE_READS if takes_divergence else ())]
            ),
            needs_reference=needs_reference,
            reads_lengths=reads_lengths,
            takes_divergence=takes_divergence,
            needs_label_smoothing=needs_label_smoothing,
            is_of_batch=is_of_batch,
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


def _dpop_norm_penalty(pair: PairScores, options: LossOptions) -> Tensor:
    return _dpop_penalty(pair, options) / pair.chosen_lengths


def _dpop_kernel(token_logps: Tensor, cu_seqlens: Tensor, refs: Tensor, options: LossOptions) -> PairLosses:
    from dpop_kernels.losses.fused import pair_dpop_loss  # needs triton

    return pair_dpop_loss(token_logps, cu_seqlens, refs, options)


def _dpo_kernel(token_logps: Tensor, cu_seqlens: Tensor, refs: Tensor, options: LossOptions) -> PairLosses:
    return _dpop_kernel(token_logps, cu_seqlens, refs, options._replace(dpop_lambda=0.0))


@register_loss("dpop", reads=["label_smoothing"], takes_divergence=True, penalty=_dpop_penalty, kernel=_dpop_kernel)
def dpop(pair: PairScores, options: LossOptions) -> Tensor:
    return _positive(pair.margins, _dpop_penalty(pair, options), options)


@register_loss(
    "dpop_norm", reads=["label_smoothing"], reads_lengths=True, takes_divergence=True, penalty=_dpop_norm_penalty
)
def _dpop_norm(pair: PairScores, options: LossOptions) -> Tensor:
    return _positive(_margins_per_token(pair), _dpop_norm_penalty(pair, options), options)


@register_loss("dpo", trl_name="sigmoid", reads=["label_smoothing"], takes_divergence=True, kernel=_dpo_kernel)
def dpo(pair: PairScores, options: LossOptions) -> Tensor:
    return _positive(pair.margins, 0.0, options)


@register_loss("dpo_norm", trl_name="sigmoid_norm", reads_lengths=True, takes_divergence=True)
def _dpo_norm(pair: PairScores, options: LossOptions) -> Tensor:
    return _nll(options.beta * _margins_per_token(pair))


@register_loss("ipo", takes_divergence=True)
def ipo(pair: PairScores, options: LossOptions) -> Tensor:
    return (pair.margins - 1 / (2 * options.beta)).square()


@register_loss("ipo_norm", reads_lengths=True, takes_divergence=True)
def _ipo_norm(pair: PairScores, options: LossOptions) -> Tensor:
    return (_margins_per_token(pair) - 1 / (2 * options.beta)).square()


@register_loss("slic", trl_name="hinge", takes_divergence=True)
def slic(pair: PairScores, options: LossOptions) -> Tensor:
    return torch.relu(1 - options.beta * pair.margins)


@register_loss("rdpo", reads=["rdpo_alpha"], reads_lengths=True, takes_divergence=True)
def _rdpo(pair: PairScores, options: LossOptions) -> Tensor:
    # a reward that is less by α per token: the longer chosen answer has to be above the other by that much less
    longer = pair.chosen_lengths - pair.rejected_lengths
    return _nll(options.beta * pair.margins + options.rdpo_alpha * longer)


@register_loss("robust", reads=["label_smoothing"], takes_divergence=True)
def _robust(pair: PairScores, options: LossOptions) -> Tensor:
    rewards = options.beta * pair.margins
    noise = options.label_smoothing
    # ℓ(-z) = ℓ(z) + z takes the two terms of the definition together, so that neither cancels the other
    return _nll(rewards) - noise / (1 - 2 * noise) * rewards


@register_loss("exo_pair", reads=["label_smoothing"], takes_divergence=True, needs_label_smoothing=True)
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


@register_loss("discopop", reads=["discopop_tau"], takes_divergence=True)
def _discopop(pair: PairScores, options: LossOptions) -> Tensor:
    rewards = options.beta * pair.margins
    logistic_share = torch.sigmoid(-rewards / options.discopop_tau)
    # one exponential of the sum: exp(-z) alone overflows where its share vanishes
    exponential = torch.exp(F.logsigmoid(rewards / options.discopop_tau) - rewards)
    return logistic_share * _nll(rewards) + exponential


@register_loss("simpo", reads=["simpo_gamma", "label_smoothing"], needs_reference=False, reads_lengths=True)
def _simpo(pair: PairScores, options: LossOptions) -> Tensor:
    chosen, rejected = _logps_per_token(pair)
    return _smoothed(options.beta * (chosen - rejected) - options.simpo_gamma, options)


@register_loss("cpo", reads=["cpo_alpha", "label_smoothing"], needs_reference=False, reads_lengths=True)
def _cpo(pair: PairScores, options: LossOptions) -> Tensor:
    # per token, as the authors' code has the likelihood term; the equation writes the sum
    return _smoothed(options.beta * pair.logp_margins, options) + options.cpo_alpha * _sft(pair, options)


@register_loss("orpo", needs_reference=False, reads_lengths=True)
def _orpo(pair: PairScores, options: LossOptions) -> Tensor:
    chosen, rejected = map(_log_odds, _logps_per_token(pair))
    return options.beta * _nll(chosen - rejected) + _sft(pair, options)


@register_loss("sft", needs_reference=False, reads_lengths=True)
def _sft(pair: PairScores, options: LossOptions) -> Tensor:
    return -pair.chosen_logps / pair.chosen_lengths


@register_loss("aot", reads=["label_smoothing"], is_of_batch=True)
def _aot(pair: PairScores, options: LossOptions) -> Tensor:
    ref_margins = (pair.logp_margins - pair.margins).detach()
    return _smoothed(options.beta * (_ascending(pair.logp_margins) - _ascending(ref_margins)), options)


@register_loss("aot_unpaired", reads=["label_smoothing"], is_of_batch=True)
def _aot_unpaired(pair: PairScores, options: LossOptions) -> Tensor:
    margins = _ascending(pair.chosen_logratios) - _ascending(pair.rejected_logratios)
    return _smoothed(options.beta * margins, options)


@register_loss("beta_dpo", reads=["beta_dpo_alpha", "beta_dpo_threshold"], takes_divergence=True, is_of_batch=True)
def _beta_dpo(pair: PairScores, options: LossOptions) -> Tensor:
    above = pair.margins.detach().mean() - options.beta_dpo_threshold
    beta = (options.beta * (1 + options.beta_dpo_alpha * above)).clamp(min=_SMALLEST_BETA)
    return _nll(beta * pair.margins)


def _nll(z: Tensor) -> Tensor:
    """ℓ(z) = -log σ(z)."""
    return -F.logsigmoid(z)


def _smoothed(z: Tensor, options: LossOptions) -> Tensor:
    """ℓ(z) where a share ε of the labels is wrong: Mitchell 2023, "A note on DPO with noisy preferences & relationship
    to IPO"."""
    if options.label_smoothing == 0:
        return _nll(z)
    return (1 - options.label_smoothing) * _nll(z) + options.label_smoothing * _nll(-z)


def _positive(margins: Tensor, penalties: Tensor | float, options: LossOptions) -> Tensor:
    """DPOP's loss of margins and penalties, where a share ε of the labels is wrong."""
    losses = _nll(options.beta * (margins - penalties))
    if options.label_smoothing == 0:
        return losses
    # a wrong label turns the margin round; the penalty is no statement about the preference and stays
    flipped_losses = _nll(options.beta * (-margins - penalties))
    return (1 - options.label_smoothing) * losses + options.label_smoothing * flipped_losses


def _rewards(pair: PairScores, options: LossOptions) -> tuple[Tensor, Tensor]:
    return options.beta * pair.chosen_logratios, options.beta * pair.rejected_logratios


def _margins_per_token(pair: PairScores) -> Tensor:
    return pair.chosen_scores / pair.chosen_lengths - pair.rejected_scores / pair.rejected_lengths


def _logps_per_token(pair: PairScores) -> tuple[Tensor, Tensor]:
    return pair.chosen_logps / pair.chosen_lengths, pair.rejected_logps / pair.rejected_lengths


def _log_odds(logps: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P. A P that rounds to 1 has the odds of one that just does not."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def _ascending(values: Tensor) -> Tensor:
    return values.sort(stable=True).values  # equal ones in their order: the same slopes on every run
