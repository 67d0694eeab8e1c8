"""The console command `dpop`: a table of subcommands, each imported when it is asked for; errors in a line or two."""

import errno
import importlib
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from dpop_trainer.settings.command_parser import did_you_mean
from dpop_trainer.settings.errors import UsageError, folder_written_to, printable, what_was_done

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
DPOP_DEBUG=1 in the environment shows where an error came from.
"""


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
        from importlib.metadata import version

        print(f"dpop-kernels {version('dpop-kernels')}")
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        hint = did_you_mean(argv[0], COMMANDS)
        print(f"dpop: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}.{hint}\n\n{USAGE}", file=sys.stderr)
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


def _told(command: str, error: Exception) -> int:
    """Say what went wrong, without the secrets that a value may hold -> the exit code."""
    from dpop_trainer.run_folder.private import text_without_secrets

    if os.environ.get("DPOP_DEBUG"):
        print(text_without_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
    doing = what_was_done(error)
    while_doing = "" if doing is None else f"while {doing}: "
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        told = f"{while_doing}no space left on a disk ({error}). {_free_space(folder_written_to(error))}"
    elif isinstance(error, (ValueError, FileNotFoundError)) and (doing is None or _is_ours(error)):
        told = str(error)  # which says by itself what was expected
    else:
        told = f"{while_doing}{type(error).__name__}: {error}\nSet DPOP_DEBUG=1 in the environment to see where."
    print(printable(f"dpop {command}: {text_without_secrets(told)}"), file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it, in its own words, or a library did."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and Path(last.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _free_space(folder: str | None) -> str:
    """Where a run writes, and how much room there is: the error itself seldom says which file it was."""
    places = {} if folder is None else {"the folder written to": str(folder)}
    places |= {"the working directory": ".", "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
    if "datasets" in sys.modules:
        places["HF_DATASETS_CACHE"] = str(sys.modules["datasets"].config.HF_DATASETS_CACHE)
    free = [
        f"{shutil.disk_usage(path).free / 2**30:.1f} GiB in {name} ({Path(path).absolute()})"
        for name, path in places.items()
        if os.path.isdir(path)
    ]
    return f"Free: {', '.join(free)}. Make room where this command writes, and give it again."


def _imported_when_called(place: str) -> Callable[[list[str]], int]:
    """The function at "module:function", whose module is imported when it is called."""
    module, _, function = place.partition(":")
    return lambda argv: getattr(importlib.import_module(module), function)(argv)


COMMANDS = {name: _imported_when_called(place) for name, (place, _) in COMMAND_TABLE.items()}
