"""Preference losses on summed log-probs: four tensors [B] in, losses [B] (or their mean) out; and losses by weight.

The formulas are in `formulas`. All arithmetic is in fp32 or better: λβ multiplies whatever error Δw carries.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from dpop_kernels.losses.divergences import DIVERGENCES, is_reverse_kl
from dpop_kernels.losses.formulas import LOSSES, LossFormula, PairScores, dpo, dpop, ipo, slic
from dpop_kernels.losses.options import LossOptions, check_hyperparameters
from dpop_kernels.outputs import PairLosses
from dpop_kernels.precision import at_least_fp32

Reduction = Literal["mean", "sum", "none"]


def dpop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    dpop_lambda: float = 50.0,
    dead_zone: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO-Positive loss: DPO with a penalty on every nat that the chosen answer falls below the reference.

        loss = -log σ(β · (Δw - Δl - λ · max(0, -Δw)))
        Δw = chosen_logps - ref_chosen_logps,  Δl = rejected_logps - ref_rejected_logps

    λ sits inside β and inside the sigmoid, as in the paper's equation 3. Plain DPO only asks that Δw exceed Δl and
    may lower both; here lowering the chosen answer costs λ times more than it can gain, so the optimum keeps Δw ≥ 0.

    At Δw = 0 the penalty has slope 0, as `torch.relu` has. The policy equals the reference at the first step, so
    this choice sets the size of the first gradient: with slope 0 it is DPO's, with slope 1 it would be 1 + λ times
    that. Where policy and reference agree up to rounding only, a `dead_zone` keeps rounding from choosing.

    Gradients:
        ∂loss/∂chosen_logps   = -β σ(-z) (1 + λ·[Δw < 0])
        ∂loss/∂rejected_logps = +β σ(-z)                       where loss = -log σ(z)

    With dead_zone τ the penalty is λ · max(0, -Δw - τ): none for the first τ nats. With label_smoothing ε the loss is
    its expectation where a share ε of the labels is wrong: (1-ε) · -log σ(β(m - p)) + ε · -log σ(β(-m - p)), m being
    the margin Δw - Δl and p the penalty. A wrong label turns the margin round; the penalty says that this answer's
    probability is not to fall, and stays. See docs/losses.md.

    Args:
        chosen_logps: [B] log-prob of each chosen answer under the policy, summed over its tokens, in nats.
        rejected_logps: [B] the same for the rejected answers.
        ref_chosen_logps: [B] the chosen answers under the reference model; no gradient is needed.
        ref_rejected_logps: [B] the rejected answers under the reference model.
        beta: β > 0, in 1/nat: how strongly the log-ratios count. The paper uses 0.3.
        dpop_lambda: λ ≥ 0: weight of the penalty. The paper tries 5 to 500 and settles on 50; 0 is DPO, bit for bit.
        dead_zone: τ ≥ 0, in nats; 0 is the paper's loss, bit for bit.
        label_smoothing: ε in [0, 0.5): the share of pairs believed to be labelled the wrong way round.
        reduction: "mean" over the batch, "sum", or "none" for one loss per pair.

    Returns:
        Scalar, or [B] for reduction="none"; fp32 (fp64 if the log-probs are fp64).

    Raises:
        ValueError: shapes, dtypes or devices disagree, β ≤ 0, λ < 0, τ < 0, ε outside [0, 0.5), or the reduction is
            unknown.

    Source:
        Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
        arXiv:2402.13228, equation 3.

    Example:
        >>> import torch
        >>> from dpop_kernels import dpop_loss
        >>> loss = dpop_loss(
        ...     chosen_logps=torch.tensor([-11.0]), rejected_logps=torch.tensor([-14.0]),
        ...     ref_chosen_logps=torch.tensor([-10.0]), ref_rejected_logps=torch.tensor([-12.0]),
        ...     beta=0.1, dpop_lambda=5.0,
        ... )
        >>> # Δw = -1, Δl = -2: margin +1, penalty 5 · 1, so z = 0.1 · (1 - 5) = -0.4
        >>> round(loss.item(), 4)  # log(1 + exp(0.4))
        0.913
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    options = LossOptions(beta, dpop_lambda, dead_zone, label_smoothing)
    return _loss_of_logps(dpop, logps, options, reduction)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO loss: -log σ(β · (Δw - Δl)), on summed log-probs as in the paper.

    With label_smoothing ε it is cDPO: (1-ε) · -log σ(z) + ε · -log σ(-z) with z = β · (Δw - Δl), least where
    σ(z) = 1 - ε.

    Args, Returns, Raises: as `dpop_loss`.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, equation 7; for smoothed labels Mitchell 2023, "A note on DPO with
        noisy preferences & relationship to IPO".
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _loss_of_logps(dpo, logps, LossOptions(beta, label_smoothing=label_smoothing), reduction)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    reduction: Reduction = "mean",
) -> Tensor:
    """IPO loss: (Δw - Δl - 1/(2β))², where β is the paper's τ.

    The paper writes log-probs of whole answers, that is sums over tokens, and so does this function. TRL divides each
    answer's log-ratio by its number of tokens first, which its authors report that IPO's authors endorse: to get
    that variant pass means instead of sums, or ask `pair_loss` or the trainer for "ipo_norm". The target margin
    1/(2β) is then in nats per token.

    Args, Returns, Raises: as `dpop_loss`.

    Source:
        Azar et al. 2023, arXiv:2310.12036, equation 17.
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _loss_of_logps(ipo, logps, LossOptions(beta), reduction)


def slic_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    reduction: Reduction = "mean",
) -> Tensor:
    """SLiC hinge loss on log-ratios: max(0, 1 - β · (Δw - Δl)).

    SLiC-HF itself ranks log π(y_w|x) against log π(y_l|x) with margin δ, on sums, and without a reference model
    (it regularises by a cross-entropy term instead). The form with log-ratios, β = 1/δ, is the one that RSO
    (arXiv:2309.06657) introduced, that TRL calls "hinge", and that the DPOP paper compares with. For SLiC-HF's own
    form pass zeros as reference.

    Args, Returns, Raises: as `dpop_loss`.

    Source:
        Zhao et al. 2023, arXiv:2305.10425, section 2.3; Liu et al. 2023, arXiv:2309.06657, section 3.2.
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _loss_of_logps(slic, logps, LossOptions(beta), reduction)


def terms_of_segments(
    loss_weights: Mapping[str, float],
    segment_logps: Tensor,  # [B, 3] shared, chosen tail, rejected tail
    ref_segment_logps: Tensor,  # [B, 3]
    segment_lengths: Tensor,  # [B, 3] tokens; NaN where unknown
    options: LossOptions,
    *,
    unweighted_logps: Tensor | None = None,  # [B, 3]
) -> tuple[PairLosses, dict[str, Tensor]]:
    """The weighted sum of losses from per-segment log-prob sums, and each loss [B] by itself, detached, unweighted.

    The margin comes from the tails alone, so the shared tokens cancel exactly rather than numerically. Where tokens are
    weighted, log-ratios are of weighted sums, and a loss of the log-probs alone gets `unweighted_logps`.
    """
    plain_logps = segment_logps if unweighted_logps is None else unweighted_logps
    shared, chosen, rejected = (segment_logps - ref_segment_logps).unbind(-1)
    chosen_logratios, rejected_logratios, margins = shared + chosen, shared + rejected, chosen - rejected
    lengths = segment_lengths.to(segment_logps.dtype)
    scores = PairScores(
        chosen_logps=plain_logps[:, 0] + plain_logps[:, 1],
        rejected_logps=plain_logps[:, 0] + plain_logps[:, 2],
        logp_margins=plain_logps[:, 1] - plain_logps[:, 2],
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        **_scores(chosen_logratios, rejected_logratios, margins, options),
        chosen_lengths=(lengths[:, 0] + lengths[:, 1]).clamp(min=1),
        rejected_lengths=(lengths[:, 0] + lengths[:, 2]).clamp(min=1),
    )
    losses, terms = _weighted_sum(loss_weights, scores, options)
    with torch.no_grad():
        penalties = [penalty(scores, options) for name in loss_weights if (penalty := LOSSES[name].penalty)]
        pairs = PairLosses(
            losses=losses,
            chosen_logps=segment_logps[:, 0] + segment_logps[:, 1],
            rejected_logps=segment_logps[:, 0] + segment_logps[:, 2],
            chosen_logratios=chosen_logratios.detach(),
            rejected_logratios=rejected_logratios.detach(),
            margins=margins.detach(),
            penalties=sum(penalties, start=torch.zeros_like(losses)),
        )
    return pairs, terms


def reduce_losses(losses: Tensor, reduction: Reduction) -> Tensor:
    """[B] -> scalar by "mean" or "sum", or [B] unchanged for "none".

    Raises:
        ValueError: the reduction is unknown.
    """
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    if reduction == "none":
        return losses
    raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}.")


def _scores(
    chosen_logratios: Tensor, rejected_logratios: Tensor, margins: Tensor, options: LossOptions
) -> dict[str, Tensor]:
    """The fields of `PairScores` that the divergence decides."""
    if is_reverse_kl(options.f_divergence_type, options.f_alpha_divergence_coef):
        return {"chosen_scores": chosen_logratios, "rejected_scores": rejected_logratios, "margins": margins}
    score, alpha = DIVERGENCES[options.f_divergence_type], options.f_alpha_divergence_coef
    chosen, rejected = score(chosen_logratios, alpha), score(rejected_logratios, alpha)
    return {"chosen_scores": chosen, "rejected_scores": rejected, "margins": chosen - rejected}


def _weighted_sum(
    loss_weights: Mapping[str, float], scores: PairScores, options: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    losses, terms = None, {}
    for name, weight in loss_weights.items():
        # not multiplied by 0: a loss that is only watched may be infinite
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            term = LOSSES[name].formula(scores, options)
        terms[name] = term.detach()
        if weight != 0:
            weighted = term if weight == 1 else weight * term
            losses = weighted if losses is None else losses + weighted
    assert losses is not None, "resolve_losses wants a weight above 0"
    return losses, terms


def _loss_of_logps(
    formula: LossFormula,
    logps: tuple[Tensor, Tensor, Tensor, Tensor],
    options: LossOptions,
    reduction: Reduction,
) -> Tensor:
    check_hyperparameters(options)
    _check_logps(*logps)
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = map(at_least_fp32, logps)
    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    unknown = chosen_logratios.detach().new_full(chosen_logratios.shape, math.nan)
    scores = PairScores(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        logp_margins=chosen_logps - rejected_logps,
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        **_scores(chosen_logratios, rejected_logratios, chosen_logratios - rejected_logratios, options),
        chosen_lengths=unknown,
        rejected_lengths=unknown,
    )
    return reduce_losses(formula(scores, options), reduction)


def _check_logps(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> None:
    others = {"rejected_logps": rejected, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    for name, tensor in {"chosen_logps": chosen, **others}.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor of shape [B], got {type(tensor).__name__}.")
    if chosen.dim() != 1:
        raise ValueError(
            f"chosen_logps: expected shape [B], got {list(chosen.shape)}. "
            "Sum the token log-probs over each answer first."
        )
    for name, tensor in {"chosen_logps": chosen, **others}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}.")
    for name, tensor in others.items():
        if tensor.shape != chosen.shape:
            raise ValueError(
                f"{name}: expected shape {list(chosen.shape)} as chosen_logps has, got {list(tensor.shape)}."
            )
        if tensor.device != chosen.device:
            raise ValueError(f"{name}: expected device {chosen.device} as chosen_logps has, got {tensor.device}.")
        if tensor.dtype != chosen.dtype:
            raise ValueError(
                f"{name}: expected dtype {chosen.dtype} as chosen_logps has, got {tensor.dtype}. "
                "Cast all four to float32 or float64."
            )
