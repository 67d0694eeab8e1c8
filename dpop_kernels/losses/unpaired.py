"""The loss on single answers, each desirable or not, from their summed log-probs: KTO's, and APO-zero's without pairs.

    Δ = log π(y|x) - log π_ref(y|x)                summed over the answer, in nats
    z0 = max(0, mean of Δ over prompts with another prompt's answer)        an estimate of KL(π ‖ π_ref), no gradient
    loss = w_D · σ(-β (Δ - z0)) of a desirable answer,   w_U · σ(β (Δ - z0)) of an undesirable one

1 - σ(x) is written σ(-x), which does not cancel. What one answer weighs does not depend on the others', but for z0.
"""

import torch
from torch import Tensor

from dpop_kernels.losses.on_sums import Reduction, reduce_losses
from dpop_kernels.losses.options import INFINITY
from dpop_kernels.precision import at_least_fp32

UNPAIRED_LOSSES = {"kto": True, "apo_zero_unpaired": False}
"""TRL's names of the loss -> whether it has a KL term: without one it is `kto_loss` with a kl of 0."""


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    is_desirable: Tensor,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KTO loss: answers that were liked or disliked, without pairs of them.

    With a kl of 0 it is APO-zero's loss for unpaired answers (TRL's "apo_zero_unpaired").

    Args:
        logps: [B] log-prob of each answer under the policy, summed over its tokens, in nats.
        ref_logps: [B] the same under the reference model; no gradient is needed.
        is_desirable: [B] bool.
        kl: z0, a scalar in nats, >= 0, through which no gradient flows: max(0, mean of log π(y'|x) - log π_ref(y'|x))
            over prompts x with another prompt's answer y', over all processes.
        beta: β > 0, in 1/nat.
        desirable_weight: w_D > 0. The paper asks for w_D · (number of desirable answers) in [1, 4/3] of w_U · (number
            of undesirable ones).
        undesirable_weight: w_U > 0.
        reduction: "mean" over the batch, "sum", or "none" for one loss per answer.

    Returns:
        Scalar, or [B] for reduction="none"; fp32 (fp64 if the log-probs are fp64).

    Raises:
        ValueError: shapes or dtypes disagree, β, a weight or kl is out of its range, or the reduction is unknown.

    Source:
        Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306, equations 7
        and 8 (z0: section 4.1); for kl = 0 D'Oosterlinck et al. 2024, arXiv:2408.06266.

    Example:
        >>> import torch
        >>> from dpop_kernels import kto_loss
        >>> loss = kto_loss(torch.tensor([-4.0]), torch.tensor([-5.0]), torch.tensor([True]), kl=1.0)
        >>> loss.item()  # Δ = 1 = z0: σ(0)
        0.5
    """
    check_kto_options(beta, desirable_weight, undesirable_weight)
    _check_answers(logps, ref_logps, is_desirable)
    if not isinstance(kl, Tensor) and not 0 <= kl < INFINITY:
        raise ValueError(f"kl: expected a finite number of nats >= 0, got {kl}. It is a mean that is cut off at 0.")
    logps, ref_logps = at_least_fp32(logps), at_least_fp32(ref_logps)
    distances = beta * (logps - ref_logps - (kl.detach() if isinstance(kl, Tensor) else kl))
    losses = torch.where(
        is_desirable, desirable_weight * torch.sigmoid(-distances), undesirable_weight * torch.sigmoid(distances)
    )
    return reduce_losses(losses, reduction)


def check_kto_options(beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    """
    Raises:
        ValueError: one of them is not a finite number above 0.
    """
    options = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for name, value in options.items():
        if not 0 < value < INFINITY:
            raise ValueError(f"{name}: expected a finite value > 0, got {value}.")


def _check_answers(logps: Tensor, ref_logps: Tensor, is_desirable: Tensor) -> None:
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(
            f"logps: expected floating-point log-probs of shape [B], got {logps.dtype} of shape {list(logps.shape)}. "
            "Sum the token log-probs over each answer first."
        )
    if ref_logps.shape != logps.shape:
        raise ValueError(f"ref_logps: expected shape {list(logps.shape)} as logps has, got {list(ref_logps.shape)}.")
    if is_desirable.shape != logps.shape or is_desirable.dtype != torch.bool:
        raise ValueError(
            f"is_desirable: expected bools of shape {list(logps.shape)}, got {is_desirable.dtype} of shape "
            f"{list(is_desirable.shape)}."
        )
