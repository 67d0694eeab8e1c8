"""The hyper-parameters of the losses, and their checks."""

from typing import NamedTuple

from dpop_kernels.losses.divergences import DIVERGENCES, NEEDS_ALPHA, REVERSE_KL

INFINITY = float("inf")


class LossOptions(NamedTuple):
    """What losses depend on beside the log-probs. A loss declares which of these it reads; all read β, or may."""

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
    f_divergence_type: str = REVERSE_KL
    """What keeps the policy at the reference: a name of `DIVERGENCES`."""
    f_alpha_divergence_coef: float = 0.5
    """α of the alpha divergence."""
    simpo_gamma: float = 0.5
    """γ ≥ 0: the margin between rewards, which have β in them, that SimPO asks for."""
    cpo_alpha: float = 1.0
    """Weight ≥ 0 of CPO's likelihood term."""
    rdpo_alpha: float = 0.01
    """α ≥ 0: what R-DPO takes off a reward for each token."""
    beta_dpo_alpha: float = 0.6
    """α ≥ 0, in 1/nat: how far β-DPO's β follows the batch's mean margin."""
    beta_dpo_threshold: float = 0.0
    """M₀, in nats: the mean margin at which β-DPO's β is `beta`."""


# what has to be greater than 0 -> what papers take
_POSITIVE = {"beta": "DPOP's paper uses 0.3.", "discopop_tau": "The paper uses 0.05."}
# what must not be negative -> what 0 is
_NOT_NEGATIVE = {
    "dpop_lambda": "The paper uses 50; 0 is plain DPO.",
    "dead_zone": "In nats: 0 is the paper's loss; 0.01 is above the rounding of a reference in fp32.",
    "simpo_gamma": "0 asks for no margin.",
    "cpo_alpha": "0 leaves the likelihood out.",
    "rdpo_alpha": "0 is DPO.",
    "beta_dpo_alpha": "0 is DPO.",
}
_FINITE = {
    "f_alpha_divergence_coef": "0 is the forward KL, 1 the reverse.",
    "beta_dpo_threshold": "In nats: the mean margin at which β is as given.",
}


def check_hyperparameters(options: LossOptions) -> None:
    """
    Raises:
        ValueError: a number outside its range or not finite, a divergence that there is not, or α of a divergence with
            one that has none.
    """
    values = options._asdict()
    for name, remedy in _POSITIVE.items():
        if not 0 < values[name] < INFINITY:
            raise ValueError(f"{name}: expected a finite value > 0, got {values[name]}. {remedy}")
    for name, remedy in _NOT_NEGATIVE.items():
        if not 0 <= values[name] < INFINITY:
            raise ValueError(f"{name}: expected a finite value >= 0, got {values[name]}. {remedy}")
    for name, remedy in _FINITE.items():
        if not -INFINITY < values[name] < INFINITY:
            raise ValueError(f"{name}: expected a finite number, got {values[name]}. {remedy}")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: expected a value in [0, 0.5), got {options.label_smoothing}. It is the share of pairs "
            "that are labelled the wrong way round; from a half on, swap chosen and rejected."
        )
    if options.f_divergence_type not in DIVERGENCES:
        raise ValueError(
            f"f_divergence_type: expected one of {', '.join(DIVERGENCES)}, got {options.f_divergence_type!r}. DPO and "
            f"DPOP are derived from {REVERSE_KL}."
        )
    usual = LossOptions._field_defaults["f_alpha_divergence_coef"]
    if options.f_alpha_divergence_coef != usual and options.f_divergence_type not in NEEDS_ALPHA:
        raise ValueError(
            f"f_alpha_divergence_coef: expected {usual} with f_divergence_type {options.f_divergence_type!r}, which "
            f"has no α, got {options.f_alpha_divergence_coef}. {', '.join(NEEDS_ALPHA)} has."
        )
