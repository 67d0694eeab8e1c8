"""Which losses are asked for, by our names or TRL's, and with what weights; checked before compute is spent."""

import difflib
import math
from collections.abc import Sequence

from dpop_kernels.losses.divergences import REVERSE_KL
from dpop_kernels.losses.formulas import DEFAULT_LOSS, LOSSES, TRL_NAMES
from dpop_kernels.losses.options import LossOptions, check_hyperparameters

NOT_OFFERED = {
    "kto_pair": " TRL has it no longer: KTOTrainer trains on single answers, each labelled good or bad.",
}
"""Names that older scripts use -> what to do instead."""


def resolve_losses(
    loss_type: str | Sequence[str], loss_weights: float | Sequence[float] | None = None
) -> dict[str, float]:
    """Names and weights as a user gives them -> our names of the losses and the weight of each, in the given order.

    Args:
        loss_type: one name or several; TRL's names are understood ("sigmoid" is "dpo", "hinge" is "slic").
        loss_weights: one for each name; None is 1 for each. A loss of weight 0 is computed and not trained on.

    Raises:
        ValueError: a name that is unknown or there twice; weights that are not as many, negative, not finite or all 0.
    """
    names = [_resolve_name(name) for name in ([loss_type] if isinstance(loss_type, str) else loss_type)]
    if not names:
        raise ValueError(f"loss_type: expected at least one loss, got none. The default is {DEFAULT_LOSS!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"loss_type: expected each loss once, got {list(loss_type)}. Give it the sum of its weights.")
    if loss_weights is None:
        weights = [1.0] * len(names)
    else:
        weights = [loss_weights] if isinstance(loss_weights, int | float | str) else list(loss_weights)
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights: expected one for each loss, {len(names)} for {names}, got {len(weights)}: {weights}."
        )
    weights = [_as_weight(weight) for weight in weights]
    if not any(weights):
        raise ValueError(f"loss_weights: expected at least one above 0, got {weights}. Nothing would be trained.")
    return dict(zip(names, weights, strict=True))


def needs_reference(loss_type: str | Sequence[str]) -> bool:
    """Whether any of the named losses reads the reference model's log-probs. "sft" and "simpo", say, do not.

    Raises:
        ValueError: a name is unknown.
    """
    return any(LOSSES[name].needs_reference for name in resolve_losses(loss_type))


def has_penalty(loss_type: str | Sequence[str]) -> bool:
    """Whether any of the named losses penalises chosen answers that become less probable, with λ and τ.

    Raises:
        ValueError: a name is unknown.
    """
    return any(LOSSES[name].penalty is not None for name in resolve_losses(loss_type))


def losses_of_batch(loss_type: str | Sequence[str]) -> list[str]:
    """Those of the named losses that compare the pairs of a batch with each other, by our names.

    Raises:
        ValueError: a name is unknown.
    """
    return [name for name in resolve_losses(loss_type) if LOSSES[name].is_of_batch]


def reads_option(loss_type: str | Sequence[str], option: str) -> bool:
    """Whether a field of `LossOptions` has an effect on any of the named losses, or on what is logged of them.

    Raises:
        ValueError: a name is unknown.
    """
    names = resolve_losses(loss_type)
    return option == "beta" or any(option in LOSSES[name].reads for name in names)  # rewards are logged times β


def check_options(options: LossOptions, loss_types: Sequence[str]) -> None:
    """The hyper-parameters by themselves, and with the losses that are to read them.

    Args:
        options: the hyper-parameters.
        loss_types: our names of the losses, as `resolve_losses` gives them.

    Raises:
        ValueError: a value outside its range; one other than the default that no loss reads; no label smoothing where
            a loss is defined by it; a divergence with a loss that is derived from the reverse KL alone.
    """
    check_hyperparameters(options)
    for name in loss_types:
        if LOSSES[name].needs_label_smoothing and not options.label_smoothing:
            raise ValueError(
                f"label_smoothing: expected a value > 0 with {name!r}, whose target distribution is (1-ε, ε), got 0. "
                "Take 1e-3 where labels are trusted."
            )
        is_of_reverse_kl = LOSSES[name].needs_reference and not LOSSES[name].takes_divergence
        if is_of_reverse_kl and options.f_divergence_type != REVERSE_KL:
            takers = [taker for taker, loss in LOSSES.items() if loss.takes_divergence]
            raise ValueError(
                f"f_divergence_type: expected {REVERSE_KL!r} with {name!r}, which is not one of the difference of two "
                f"scores, in which what depends on the prompt cancels, got {options.f_divergence_type!r}. These are: "
                f"{', '.join(takers)}."
            )
    for name, usual in LossOptions._field_defaults.items():
        value = getattr(options, name)
        if value != usual and not reads_option(loss_types, name):
            readers = [loss for loss in LOSSES if reads_option(loss, name)]
            raise ValueError(
                f"{name}: expected {usual!r} with loss_type {list(loss_types)}, which does not read it, got {value!r}. "
                f"These do: {', '.join(readers)}."
            )


def _resolve_name(name: str) -> str:
    if not isinstance(name, str):
        raise ValueError(f"loss_type: expected names, got {name!r}. Known are {sorted(LOSSES)}.")
    resolved = TRL_NAMES.get(name, name)
    if resolved not in LOSSES:
        hint = NOT_OFFERED[name] if name in NOT_OFFERED else _did_you_mean(name)
        raise ValueError(f"loss_type: expected one of {sorted(LOSSES)}, got {name!r}.{hint}")
    return resolved


def _did_you_mean(name: str) -> str:
    """The closest name that begins alike: `kto_pair` is no slip for `exo_pair`."""
    begins = name.partition("_")[0]
    alike = [
        known for known in (*LOSSES, *TRL_NAMES) if difflib.get_close_matches(begins, [known.partition("_")[0]], n=1)
    ]
    close = difflib.get_close_matches(name, alike, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _as_weight(weight: float | str) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"loss_weights: expected finite numbers >= 0, got {weight!r}.")
    return value
