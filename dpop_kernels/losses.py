"""Preference losses on summed log-probs: four tensors [B] in, losses [B] (or their mean) out.

With Δw = log π(y_w|x) - log π_ref(y_w|x), Δl likewise for the rejected answer, and margin m = Δw - Δl:

    dpop   -log σ(β · (m - λ · max(0, -Δw)))      Pal et al. 2024, arXiv:2402.13228, eq. 3
    dpo    -log σ(β · m)                          Rafailov et al. 2023, arXiv:2305.18290, eq. 7
    ipo    (m - 1 / (2β))²                        Azar et al. 2023, arXiv:2310.12036, eq. 17 (their τ is β)
    slic   max(0, 1 - β · m)                      Zhao et al. 2023, arXiv:2305.10425, on log-ratios

Every loss is a function of Δw and m; each is written once here and registered in `LOSSES`. All arithmetic is in
fp32 or better: λβ multiplies whatever error Δw carries.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpop_kernels.outputs import PairLosses

Reduction = Literal["mean", "sum", "none"]


def _dpop(chosen_logratios: Tensor, margins: Tensor, *, beta: float, dpop_lambda: float) -> Tensor:
    return -F.logsigmoid(beta * (margins - dpop_penalties(chosen_logratios, dpop_lambda)))


def _dpo(chosen_logratios: Tensor, margins: Tensor, *, beta: float, dpop_lambda: float) -> Tensor:
    return -F.logsigmoid(beta * margins)


def _ipo(chosen_logratios: Tensor, margins: Tensor, *, beta: float, dpop_lambda: float) -> Tensor:
    return (margins - 1 / (2 * beta)).square()


def _slic(chosen_logratios: Tensor, margins: Tensor, *, beta: float, dpop_lambda: float) -> Tensor:
    return torch.relu(1 - beta * margins)


LOSSES: dict[str, Callable[..., Tensor]] = {"dpop": _dpop, "dpo": _dpo, "ipo": _ipo, "slic": _slic}


def dpop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    dpop_lambda: float = 50.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO-Positive loss: DPO with a penalty on every nat that the chosen answer falls below the reference.

        loss = -log σ(β · (Δw - Δl - λ · max(0, -Δw)))
        Δw = chosen_logps - ref_chosen_logps,  Δl = rejected_logps - ref_rejected_logps

    λ sits inside β and inside the sigmoid, as in the paper's equation 3. Plain DPO only asks that Δw exceed Δl and
    may lower both; here lowering the chosen answer costs λ times more than it can gain, so the optimum keeps Δw ≥ 0.

    At Δw = 0 the penalty has slope 0, as `torch.relu` has. The policy equals the reference at the first step, so
    this choice sets the size of the first gradient: with slope 0 it is DPO's, with slope 1 it would be 1 + λ times
    that.

    Gradients:
        ∂loss/∂chosen_logps   = -β σ(-z) (1 + λ·[Δw < 0])
        ∂loss/∂rejected_logps = +β σ(-z)                       where loss = -log σ(z)

    Args:
        chosen_logps: [B] log-prob of each chosen answer under the policy, summed over its tokens, in nats.
        rejected_logps: [B] the same for the rejected answers.
        ref_chosen_logps: [B] the chosen answers under the reference model; no gradient is needed.
        ref_rejected_logps: [B] the rejected answers under the reference model.
        beta: β > 0, in 1/nat: how strongly the log-ratios count. The paper uses 0.3.
        dpop_lambda: λ ≥ 0: weight of the penalty. The paper tries 5 to 500 and settles on 50; 0 is DPO, bit for bit.
        reduction: "mean" over the batch, "sum", or "none" for one loss per pair.

    Returns:
        Scalar, or [B] for reduction="none"; fp32 (fp64 if the log-probs are fp64).

    Raises:
        ValueError: shapes, dtypes or devices disagree, β ≤ 0, λ < 0, or the reduction is unknown.

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
    return _loss_of_logps("dpop", logps, beta=beta, dpop_lambda=dpop_lambda, reduction=reduction)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.3,
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO loss: -log σ(β · (Δw - Δl)), on summed log-probs as in the paper.

    Args, Returns, Raises: as `dpop_loss`.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _loss_of_logps("dpo", logps, beta=beta, dpop_lambda=0.0, reduction=reduction)


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
    that variant pass means instead of sums. The target margin 1/(2β) is then in nats per token.

    Args, Returns, Raises: as `dpop_loss`.

    Source:
        Azar et al. 2023, arXiv:2310.12036, equation 17.
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _loss_of_logps("ipo", logps, beta=beta, dpop_lambda=0.0, reduction=reduction)


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
    return _loss_of_logps("slic", logps, beta=beta, dpop_lambda=0.0, reduction=reduction)


def dpop_penalties(chosen_logratios: Tensor, dpop_lambda: float) -> Tensor:
    """λ · max(0, -Δw), with slope 0 at Δw = 0 -> [B]."""
    return dpop_lambda * torch.relu(-chosen_logratios)


def losses_of_segments(
    loss_type: str,
    segment_logps: Tensor,  # [B, 3] shared, chosen tail, rejected tail
    ref_segment_logps: Tensor,  # [B, 3]
    *,
    beta: float,
    dpop_lambda: float,
) -> PairLosses:
    """Any loss of `LOSSES` from per-segment log-prob sums.

    The margin comes from the tails alone, so the shared tokens cancel exactly rather than numerically.
    """
    shared, chosen, rejected = (segment_logps - ref_segment_logps).unbind(-1)
    chosen_logratios = shared + chosen
    margins = chosen - rejected
    losses = LOSSES[loss_type](chosen_logratios, margins, beta=beta, dpop_lambda=dpop_lambda)
    with torch.no_grad():
        penalised = loss_type == "dpop"
        return PairLosses(
            losses=losses,
            chosen_logps=segment_logps[:, 0] + segment_logps[:, 1],
            rejected_logps=segment_logps[:, 0] + segment_logps[:, 2],
            chosen_logratios=chosen_logratios.detach(),
            rejected_logratios=(shared + rejected).detach(),
            margins=margins.detach(),
            penalties=dpop_penalties(chosen_logratios, dpop_lambda if penalised else 0.0),
        )


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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


def check_hyperparameters(beta: float, dpop_lambda: float) -> None:
    """
    Raises:
        ValueError: β ≤ 0, λ < 0, or either is not finite.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: expected a finite value > 0, got {beta}. The paper uses 0.3.")
    if not 0 <= dpop_lambda < float("inf"):
        raise ValueError(
            f"dpop_lambda: expected a finite value >= 0, got {dpop_lambda}. The paper uses 50; 0 is plain DPO."
        )


def _loss_of_logps(
    loss_type: str,
    logps: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    beta: float,
    dpop_lambda: float,
    reduction: Reduction,
) -> Tensor:
    check_hyperparameters(beta, dpop_lambda)
    _check_logps(*logps)
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = map(at_least_fp32, logps)
    chosen_logratios = chosen_logps - ref_chosen_logps
    margins = chosen_logratios - (rejected_logps - ref_rejected_logps)
    losses = LOSSES[loss_type](chosen_logratios, margins, beta=beta, dpop_lambda=dpop_lambda)
    return reduce_losses(losses, reduction)


def _check_logps(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> None:
    others = {"rejected_logps": rejected, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
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
