"""The hyper-parameters of the losses, and their checks."""

from typing import NamedTuple

INFINITY = float("inf")


class LossOptions(NamedTuple):
    """The numbers that losses depend on beside the log-probs. A loss reads those that occur in its formula."""

    beta: float = 0.3
    """β > 0, in 1/nat: how strongly the log-ratios count."""
    dpop_lambda: float = 50.0
    """λ ≥ 0: weight of DPOP's penalty."""
    dead_zone: float = 0.0
    """τ ≥ 0, in nats: how far the chosen answer may fall before the penalty begins."""
    label_smoothing: float = 0.0
    """ε in [0, 0.5): the share of pairs whose label is taken to be the wrong way round."""
    discopop_tau: float = 0.05
    """Temperature of DiscoPOP's blend, > 0."""


def check_hyperparameters(
    beta: float,
    dpop_lambda: float,
    *,
    dead_zone: float = 0.0,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> None:
    """
    Raises:
        ValueError: β ≤ 0, λ < 0, τ < 0, ε outside [0, 0.5), DiscoPOP's τ ≤ 0, or any of them is not finite.
    """
    if not 0 < beta < INFINITY:
        raise ValueError(f"beta: expected a finite value > 0, got {beta}. The paper uses 0.3.")
    if not 0 <= dpop_lambda < INFINITY:
        raise ValueError(
            f"dpop_lambda: expected a finite value >= 0, got {dpop_lambda}. The paper uses 50; 0 is plain DPO."
        )
    if not 0 <= dead_zone < INFINITY:
        raise ValueError(
            f"dead_zone: expected a finite value >= 0, in nats, got {dead_zone}. 0 is the paper's loss; 0.01 is above "
            "the rounding of a reference in fp32."
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: expected a value in [0, 0.5), got {label_smoothing}. It is the share of pairs that are "
            "labelled the wrong way round; from a half on, swap chosen and rejected."
        )
    if not 0 < discopop_tau < INFINITY:
        raise ValueError(f"discopop_tau: expected a finite value > 0, got {discopop_tau}. The paper uses 0.05.")
