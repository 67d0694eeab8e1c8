"""The console command `dpop`: one function per subcommand; anything heavy is imported by the one that needs it."""

import argparse
import errno
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpop_trainer.errors import UsageError

USAGE = """usage: dpop COMMAND [options]

  train      preference fine-tuning: dpop train --config run.yaml [--any_field value]
  sft        supervised fine-tuning on the chosen answers, to start from: dpop sft --config run.yaml
  recipes    run files for the paper's models and today's: dpop recipes, then dpop train --recipe lora
  pairs      build preference pairs, or look at yours before training: dpop pairs inspect pairs.jsonl
  inspect    what training did to the chosen answers, token by token: dpop inspect RUN --pairs pairs.jsonl
  plan       does it fit, how long, what does it cost, before booking: dpop plan --config run.yaml --device h100-80gb
  compare    several losses on the same model, data and seeds: dpop compare --config run.yaml --methods dpo dpop
  eval       benchmarks before and after training, one table: dpop eval --models BASE RUN --pairs held_out.jsonl
  mtbench    MT-Bench: dpop mtbench answer --model RUN ..., then dpop mtbench judge --endpoint URL ...
  export     merge a run's adapter, write a model card: dpop export RUN --out DIR [--push_to_hub ID]
  demo       DPO against DPOP on generated pairs, offline, in minutes: dpop demo

`dpop COMMAND --help` lists the options of one; `dpop --version` says which version this is.
Exit codes: 0 done, 1 the run failed and says on what, 2 wrong usage, 3 `pairs inspect` found something serious or
`plan` that the run does not fit, 130 interrupted (Ctrl-C).
DPOP_DEBUG=1 in the environment shows where an error came from.
"""

PRINT_CONFIG = ("--print-config", "--print_config")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand -> exit code: 0 done, 1 the run failed, 2 wrong usage, 3 `pairs inspect` found something
    serious or `plan` that the run does not fit, 130 interrupted.

    An error is told in a line or two on stderr. With DPOP_DEBUG set in the environment its traceback comes first.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"dpop-kernels {version('dpop-kernels')}")
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        print(f"dpop: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    # peft imports bitsandbytes wherever it is installed; on a CPU that warns of a kernel which only 4 bits would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return command(argv[1:])
    except KeyboardInterrupt:
        print(f"\ndpop {argv[0]}: interrupted.", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse's, after --help or a usage error that it has printed
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # whoever reads, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _told(argv[0], error)


def train(argv: list[str]) -> int:
    from dpop_trainer.config import DPOPConfig

    return _run(argv, "train", DPOPConfig)


def sft(argv: list[str]) -> int:
    from dpop_trainer.config import SFTConfig

    return _run(argv, "sft", SFTConfig)


def recipes(argv: list[str]) -> int:
    from dpop_trainer.recipes.cli import main as run

    return run(argv)


def pairs(argv: list[str]) -> int:
    from dpop_trainer.pairs.commands import run

    return run(argv)


def inspect(argv: list[str]) -> int:
    from dpop_trainer.inspection import run_inspect

    parser = argparse.ArgumentParser(
        "dpop inspect", description="Hold a trained model against its reference on preference pairs, token by token."
    )
    parser.add_argument("model", help="folder of a run, a model or an adapter, or a hub id")
    parser.add_argument("--pairs", required=True, help="preference pairs: local file or hub id")
    parser.add_argument(
        "--ref_model", help="its reference; default: what the run started from, or the base model under the adapter"
    )
    parser.add_argument("--out", help="folder for inspect.json, inspect.html and figures; default: the model's own")
    parser.add_argument("--limit", type=int, default=256, help="look at the first so many pairs (default 256)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, help="cut pairs to so many tokens; default: as the run did, or 1024")
    parser.add_argument("--num_worst", type=int, default=8, help="show so many of the pairs that lost most (default 8)")
    parser.add_argument(
        "--no_checkpoints", dest="checkpoints", action="store_false", help="leave the run's checkpoints out"
    )
    run_inspect(**vars(parser.parse_args(argv)))
    return 0


def plan(argv: list[str]) -> int:
    from dpop_trainer.plan.cli import main as run

    return run(argv)


def compare(argv: list[str]) -> int:
    from dpop_trainer.arguments import ComparisonArguments, parse_arguments
    from dpop_trainer.compare.run import run_comparison
    from dpop_trainer.config import DPOPConfig

    run_comparison(*parse_arguments(DPOPConfig, argv, "dpop compare", ComparisonArguments))
    return 0


def evaluate(argv: list[str]) -> int:
    from dpop_trainer.evaluation.cli import main as run

    return run(argv)


def mtbench(argv: list[str]) -> int:
    from dpop_trainer.mtbench.cli import main as run

    return run(argv)


def export(argv: list[str]) -> int:
    from dpop_trainer.delivery.cli import main as run

    return run(argv)


def demo(argv: list[str]) -> int:
    from dpop_trainer.demo.run import run_demo

    parser = argparse.ArgumentParser("dpop demo", description="DPO against DPOP on generated low-edit pairs, offline.")
    parser.add_argument("--output_dir", default="runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    run_demo(options.output_dir, seed=options.seed)
    return 0


def _run(argv: list[str], name: str, config_class: Any) -> int:
    """Train as the arguments say, or only print them."""
    from dpop_trainer.arguments import format_config, parse_arguments

    parts = parse_arguments(config_class, argv, f"dpop {name}")
    if any(flag in argv for flag in PRINT_CONFIG):
        print(format_config(*parts))
        return 0
    from dpop_trainer.runs import run_sft, run_train

    try:
        (run_train if name == "train" else run_sft)(*parts)
    except KeyboardInterrupt:
        print(f"\ndpop {name}: interrupted. {_how_to_resume(parts[-1].output_dir)}", file=sys.stderr)
        return 130
    return 0


def _how_to_resume(output_dir: str) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if checkpoint is None:
        return "No checkpoint was saved yet, so the same command starts anew; a smaller save_steps saves earlier."
    return f"The same command goes on from {checkpoint}."


def _told(command: str, error: Exception) -> int:
    """Say what went wrong -> the exit code."""
    if os.environ.get("DPOP_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"dpop {command}: no space left on a disk ({error}). {_free_space()}", file=sys.stderr)
    elif isinstance(error, (ValueError, FileNotFoundError)):  # which say by themselves what was expected
        print(f"dpop {command}: {error}", file=sys.stderr)
    else:
        print(
            f"dpop {command}: {type(error).__name__}: {error}\nSet DPOP_DEBUG=1 in the environment to see where.",
            file=sys.stderr,
        )
    return 2 if isinstance(error, UsageError) else 1


def _free_space() -> str:
    """Where a run writes, and how much room there is: the error itself seldom says which file it was."""
    places = {"the working directory": ".", "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
    if "datasets" in sys.modules:
        places["HF_DATASETS_CACHE"] = str(sys.modules["datasets"].config.HF_DATASETS_CACHE)
    free = [
        f"{shutil.disk_usage(path).free / 2**30:.1f} GiB in {name} ({Path(path).absolute()})"
        for name, path in places.items()
        if os.path.isdir(path)
    ]
    return f"Free: {', '.join(free)}. Make room where this command writes, and give it again."


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "sft": sft,
    "recipes": recipes,
    "pairs": pairs,
    "inspect": inspect,
    "plan": plan,
    "compare": compare,
    "eval": evaluate,
    "mtbench": mtbench,
    "export": export,
    "demo": demo,
}
