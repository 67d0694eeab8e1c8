"""The console command `dpop`: a table of subcommands, each imported when it is asked for; errors in a line or two."""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable

from dpop_trainer.data.limits import LIMITS, check_limits
from dpop_trainer.settings.command_parser import did_you_mean
from dpop_trainer.settings.errors import UsageError
from dpop_trainer.settings.terminal import say, spelt_out

# name -> the function that runs it, as "module:function", and a line of help
COMMAND_TABLE = {
    "train": (
        "dpop_trainer.training.commands:train",
        "preference fine-tuning: dpop train --config run.yaml [--any_field value]",
    ),
    "sft": (
        "dpop_trainer.training.commands:sft",
        "supervised fine-tuning on the chosen answers, to start from: dpop sft --config run.yaml",
    ),
    "recipes": (
        "dpop_trainer.tools.recipes.cli:main",
        "run files for the paper's models and today's: dpop recipes, then dpop train --recipe lora",
    ),
    "pairs": (
        "dpop_trainer.tools.pairs.commands:run",
        "build preference pairs, or look at yours before training: dpop pairs inspect pairs.jsonl",
    ),
    "inspect": (
        "dpop_trainer.tools.inspect.cli:main",
        "what training did to the chosen answers, token by token: dpop inspect RUN --pairs pairs.jsonl",
    ),
    "plan": (
        "dpop_trainer.tools.plan.cli:main",
        "does it fit, how long, what does it cost, before booking: dpop plan --config run.yaml --device h100-80gb",
    ),
    "compare": (
        "dpop_trainer.tools.compare.cli:main",
        "several losses on the same model, data and seeds: dpop compare --config run.yaml --methods dpo dpop",
    ),
    "eval": (
        "dpop_trainer.tools.evaluation.cli:main",
        "benchmarks before and after training, one table: dpop eval --models BASE RUN --pairs held_out.jsonl",
    ),
    "mtbench": (
        "dpop_trainer.tools.mtbench.cli:main",
        "MT-Bench: dpop mtbench answer --model RUN ..., then dpop mtbench judge --endpoint URL ...",
    ),
    "export": (
        "dpop_trainer.tools.delivery.cli:main",
        "merge a run's adapter, write a model card: dpop export RUN --out DIR [--push_to_hub ID]",
    ),
    "demo": ("dpop_trainer.tools.demo.cli:main", "DPO against DPOP on generated pairs, offline, in minutes: dpop demo"),
}

USAGE = f"""usage: dpop COMMAND [options]

{"".join(f"  {name:<10} {line}{chr(10)}" for name, (_, line) in COMMAND_TABLE.items())}
`dpop COMMAND --help` lists the options of one; `dpop --version` says which version this is.
Exit codes: 0 done, 1 the run failed and says on what, 2 wrong usage, 3 `pairs inspect` found something serious or
`plan` that the run does not fit, 130 interrupted (Ctrl-C).
In the environment DPOP_DEBUG=1 shows where an error came from, and {", ".join(limit.name for limit in LIMITS[:2])},
{" and ".join(limit.name for limit in LIMITS[2:])} bound what files and chat templates may take (docs/data.md).
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand -> exit code: 0 done, 1 the run failed, 2 wrong usage, 3 `pairs inspect` found something
    serious or `plan` that the run does not fit, 130 interrupted.

    An error is told in a line or two on stderr. With DPOP_DEBUG set in the environment its traceback comes first.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        say(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        say(f"dpop-kernels {version('dpop-kernels')}")
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        hint = did_you_mean(argv[0], COMMANDS)
        say(f"dpop: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}.{hint}\n\n{USAGE}", is_problem=True)
        return 2
    # peft imports bitsandbytes wherever it is installed; on a CPU that warns of a kernel which only 4 bits would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with spelt_out():
            check_limits()
            return command(argv[1:])
    except KeyboardInterrupt:
        say(f"\ndpop {argv[0]}: interrupted.", is_problem=True)
        return 130
    except SystemExit as stop:  # argparse's, after --help or a usage error that it has printed
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # whoever reads, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from dpop_trainer.run_folder.private import text_without_secrets
        from dpop_trainer.settings.told import told

        if os.environ.get("DPOP_DEBUG"):
            say(text_without_secrets("".join(traceback.format_exception(error))), is_problem=True)
        say(told(argv, error), is_problem=True)
        return 2 if isinstance(error, UsageError) else 1


def _imported_when_called(place: str) -> Callable[[list[str]], int]:
    """The function at "module:function", whose module is imported when it is called."""
    module, _, function = place.partition(":")
    return lambda argv: getattr(importlib.import_module(module), function)(argv)


COMMANDS = {name: _imported_when_called(place) for name, (place, _) in COMMAND_TABLE.items()}
