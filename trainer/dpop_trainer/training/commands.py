"""`dpop train` and `dpop sft` as the command line calls them."""

import os

from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import say
from dpop_trainer.settings.under_way import LIBRARIES, under_way

PRINT_CONFIG = ("--print-config", "--print_config")


def train(argv: list[str]) -> int:
    """Preference fine-tuning -> exit code."""
    return _run(argv, "train", "DPOPConfig")


def sft(argv: list[str]) -> int:
    """Supervised fine-tuning on the chosen answers -> exit code."""
    return _run(argv, "sft", "SFTConfig")


def _run(argv: list[str], name: str, config_class: str) -> int:
    """Train as the arguments say, or only print them. What is wrong with them is told before torch is imported."""
    from dpop_trainer.settings.arguments import check_arguments, format_config, parse_arguments

    only_printed = any(flag in argv for flag in PRINT_CONFIG)
    told = check_arguments("dpop_trainer.settings.config", config_class, argv, f"dpop {name}")
    if told is not None and not only_printed:
        from dpop_trainer.settings.run_inputs import check_data, check_inputs

        if not argv:  # nothing else can be wrong
            check_data(told[1])
        check_inputs(*told, completions=name == "sft")
    with under_way(LIBRARIES):
        from dpop_trainer.settings import config
    with doing("reading the configuration from the command line and its files"):
        parts = parse_arguments(getattr(config, config_class), argv, f"dpop {name}")
    if only_printed:
        say(format_config(*parts))
        return 0
    with under_way(LIBRARIES):
        from dpop_trainer.training.runs import run_sft, run_train

    try:
        (run_train if name == "train" else run_sft)(*parts)
    except KeyboardInterrupt:
        say(f"\ndpop {name}: interrupted. {_how_to_resume(parts[-1].output_dir)}", is_problem=True)
        return 130
    return 0


def _how_to_resume(output_dir: str) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if checkpoint is None:
        return "No checkpoint was saved yet, so the same command starts anew; a smaller save_steps saves earlier."
    return f"The same command goes on from {checkpoint}."
