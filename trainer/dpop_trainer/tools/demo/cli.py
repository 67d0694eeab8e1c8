"""The options of `dpop demo`."""

from dpop_trainer.run_folder.files import check_writable
from dpop_trainer.settings.command_parser import CommandParser


def main(argv: list[str]) -> int:
    """Parse and run."""
    parser = CommandParser("dpop demo", description="DPO against DPOP on generated low-edit pairs, offline.")
    parser.add_argument("--output_dir", default="runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    check_writable(options.output_dir)
    from dpop_trainer.tools.demo.run import run_demo

    run_demo(options.output_dir, seed=options.seed)
    return 0
