"""`dpop compare` as the command line calls it."""

from dpop_trainer.arguments import ComparisonArguments, check_arguments, parse_arguments
from dpop_trainer.run_inputs import check_inputs

PROGRAM = "dpop compare"


def main(argv: list[str]) -> int:
    """Parse, train and measure every method with every seed."""
    told = check_arguments("dpop_trainer.config", "DPOPConfig", argv, PROGRAM, ComparisonArguments)
    if told is not None:
        check_inputs(told[0], told[1], told[2].output_dir)
    from dpop_trainer.compare.run import run_comparison
    from dpop_trainer.config import DPOPConfig

    run_comparison(*parse_arguments(DPOPConfig, argv, PROGRAM, ComparisonArguments))
    return 0
