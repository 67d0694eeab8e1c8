"""The losses' hyper-parameters among a configuration's fields, and what the losses chosen ask of the rest of it.

Needs no torch: the command line checks by this before anything is imported.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpop_trainer.settings.config import DPOPConfig

# an option of the losses -> the field that has it, where it is called otherwise
_FIELDS = {"dead_zone": "dpop_dead_zone"}
# fields of DPOP's penalty that are no options of the loss by their own name -> what leaves them out
_OF_PENALTY = {"dpop_dead_zone": 0.0, "dpop_lambda_warmup_steps": 0.0}


def field_of(option: str) -> str:
    """The field that has an option of the losses."""
    return _FIELDS.get(option, option)


def option_values(args: Any, options: Iterable[str]) -> dict[str, Any]:
    """What the fields say, by the options' names."""
    return {option: getattr(args, field_of(option)) for option in options}


def check_with_losses(args: "DPOPConfig", *, of_batch: list[str], has_penalty: bool) -> None:
    """
    Args:
        args: the configuration.
        of_batch: those of its losses that compare the pairs of a batch with each other.
        has_penalty: whether any of its losses has DPOP's penalty.

    Raises:
        ValueError: a field of the penalty without one; or batches that would make another loss of one over a batch.
    """
    for name, usual in _OF_PENALTY.items():
        if not has_penalty and getattr(args, name) != usual:
            raise ValueError(
                f"{name}: expected {usual:g} with loss_type {args.loss_type}, which has no penalty, got "
                f"{getattr(args, name)}. Leave it out, or choose a loss that has one."
            )
    if of_batch:
        _check_batches(args, of_batch[0])


def _check_batches(args: "DPOPConfig", loss: str) -> None:
    is_compared = f"with {loss!r}, which compares the pairs of a batch with each other,"
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps: expected 1 {is_compared} got {args.gradient_accumulation_steps}: a step cut "
            "into batches has another loss than the step as one. Raise per_device_train_batch_size instead."
        )
    if args.max_tokens_per_batch is not None:
        raise ValueError(
            f"max_tokens_per_batch: expected None {is_compared} got {args.max_tokens_per_batch}: the number of pairs, "
            "and so the loss, would change from batch to batch. Set per_device_train_batch_size instead."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"auto_find_batch_size: expected False {is_compared} got True: a smaller batch is another loss. Choose "
            "per_device_train_batch_size."
        )
    if args.use_weighting:
        raise ValueError(
            f"use_weighting: expected False {is_compared} got True: its values belong to no pair that could be weighed."
        )
