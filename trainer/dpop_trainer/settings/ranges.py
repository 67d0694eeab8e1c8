"""Ranges of transformers' own numbers, which it checks late, without naming them, or not at all."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

_AT_LEAST_ONE = {
    "per_device_train_batch_size": "If one is too much for the memory, lower max_length.",
    "per_device_eval_batch_size": "If one is too much for the memory, lower max_length.",
    "gradient_accumulation_steps": "1 is no accumulation.",
}
_NOT_NEGATIVE = {
    "learning_rate": "The paper uses 5e-5.",
    "weight_decay": "0 is none.",
    "max_grad_norm": "0 switches clipping off.",
    "warmup_steps": "0 is no warm-up; below 1 it is a fraction of all steps.",
    "dataloader_num_workers": "0 loads in the training process.",
}
_INTERVALS = (
    ("logging_strategy", "logging_steps"),
    ("save_strategy", "save_steps"),
    ("eval_strategy", "eval_steps"),
)


def check_finite(settings: Any) -> None:
    """
    Args:
        settings: a dataclass.

    Raises:
        ValueError: a number is NaN or infinite; named.
    """
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}. Give one, or leave it out.")


def check_seed(name: str, seed: int | None) -> None:
    """
    Raises:
        ValueError: it is none that numpy takes.
    """
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"{name}: expected a whole number from 0 to {2**32 - 1}, got {seed}.")


def check_ranges(args: "TrainingArguments") -> None:
    """
    Args:
        args: as the user gave them; `TrainingArguments.__post_init__` has not run yet.

    Raises:
        ValueError: a number is outside its range; named, with the remedy.
    """
    for name, remedy in _AT_LEAST_ONE.items():
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(args, name)}. {remedy}")
    for name, remedy in _NOT_NEGATIVE.items():
        value: Any = getattr(args, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}. {remedy}")
    check_seed("seed", args.seed)
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(
            f"max_steps: expected at least 1, or -1 for as many as num_train_epochs takes, got {args.max_steps}."
        )
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise ValueError(
            f"num_train_epochs: expected a number > 0 (0.5 is half the data), got {args.num_train_epochs}. "
            "Set it, or max_steps."
        )
    for strategy, name in _INTERVALS:
        kind, value = getattr(args, strategy), getattr(args, name)
        if str(getattr(kind, "value", kind)) == "steps" and value is not None and not value > 0:
            raise ValueError(
                f"{name}: expected a number of steps > 0, or below 1 a fraction of all, got {value}. "
                f"For none set {strategy} to 'no'."
            )
    check_finite(args)
