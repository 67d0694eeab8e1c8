"""`dpop compare` as the command line calls it."""

from dpop_trainer.settings.arguments import ComparisonArguments, check_arguments, parse_arguments
from dpop_trainer.settings.run_inputs import check_inputs
from dpop_trainer.settings.under_way import LIBRARIES, under_way

PROGRAM = "dpop compare"


def main(argv: list[str]) -> int:
    """Parse, train and measure every method with every seed."""
    told = check_arguments("dpop_trainer.settings.config", "DPOPConfig", argv, PROGRAM, ComparisonArguments)
    if told is not None:
        check_inputs(*told[:3])
    with under_way(LIBRARIES):
        from dpop_trainer.settings.config import DPOPConfig
        from dpop_trainer.tools.compare.run import run_comparison

    run_comparison(*parse_arguments(DPOPConfig, argv, PROGRAM, ComparisonArguments))
    return 0
