"""`dpop pairs build` and `dpop pairs inspect` as the command line calls them."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpop_trainer.settings.command_parser import CommandParser, did_you_mean
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import say

USAGE = """usage: dpop pairs COMMAND [options]

  build RECIPE   preference pairs from data that has good answers:
                   metamath      worked solutions, one intermediate result made wrong     (GSM8K, MetaMathQA)
                   arc           right option against each wrong one                      (ARC)
                   hellaswag     right ending against each wrong one                      (HellaSwag)
                   edit          any good answers, one number, word or operator made wrong
                   from-samples  a labelled set against a model's own wrong samples
  inspect FILE   look at pairs before training on them: what is wrong, what to do about it, report as HTML and JSON

`dpop pairs build RECIPE --help` and `dpop pairs inspect --help` list the options.
"""


def run(argv: list[str]) -> int:
    """-> exit code: 0 done, 2 wrong usage, 3 (inspect) something serious was found."""
    if not argv or argv[0] in ("-h", "--help"):
        say(USAGE)
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        hint = did_you_mean(argv[0], COMMANDS)
        say(f"dpop pairs: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}.{hint}\n\n{USAGE}", is_problem=True)
        return 2
    return command(argv[1:])


def build(argv: list[str]) -> int:
    from dpop_trainer.tools.pairs.recipes import RECIPES

    parser = CommandParser("dpop pairs build", description="Build preference pairs; the source is streamed.")
    commands = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, recipe in RECIPES.items():
        help_line = (recipe.__doc__ or "").splitlines()[0]
        own = commands.add_parser(name, help=help_line, description=help_line)
        for field in fields(recipe):  # type: ignore[arg-type]
            own.add_argument(
                f"--{field.name}",
                default=field.default,
                type=type(field.default),
                help=_help(field.metadata["help"], field.default),
                choices=field.metadata.get("choices"),
            )
        _add_build_options(own)
    options = vars(parser.parse_args(argv))
    recipe = RECIPES[options.pop("recipe")]
    own_options = {field.name: options.pop(field.name) for field in fields(recipe)}  # type: ignore[arg-type]
    from dpop_trainer.tools.pairs.build import build_file

    source, out = options.pop("source"), options.pop("out")
    with doing(f"building pairs of {source} in {out}", Path(out).parent):
        counts = build_file(recipe(**own_options), source, out, **options)
    say(counts)
    for detail in counts.details():
        say(f"  {detail}")
    from dpop_trainer.measure.surface import SURFACE_REMEDY  # numpy: not before the file is found

    surface = counts.surface
    if surface is not None and surface.gives_away:
        say(f"WARNING: {surface}.\n  {SURFACE_REMEDY}")
    else:
        say(f"Surface: {surface}.")
    say(f"Written: {out}")
    return 0


def inspect(argv: list[str]) -> int:
    from dpop_trainer.tools.doctor.commands import inspect_pairs

    return inspect_pairs(argv)


def _add_build_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--source",
        required=True,
        help="a file (.jsonl, .json, both also as .gz; .parquet, .arrow), a folder or the id of a data set on the hub",
    )
    parser.add_argument("--out", required=True, help="pairs to write: .jsonl or .parquet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="read the first so many records only")
    parser.add_argument("--split", default="train", help='of a hub data set (default "train")')
    parser.add_argument("--config", help="configuration of a hub data set that has several, such as ARC-Challenge")
    parser.add_argument(
        "--form", choices=["text", "messages"], default="text", help="as text (default) or for a chat template"
    )
    parser.add_argument("--license", help="what the pairs say; default: the title of the LICENSE beside the source")
    parser.add_argument(
        "--on_bad_record", choices=["error", "skip"], default="error", help="stop at it (default), or count it"
    )


def _help(text: str, default: Any) -> str:
    text = text.replace("%", "%%")
    return f"{text} (default {default})" if default not in ("", None) else text


COMMANDS: dict[str, Callable[[list[str]], int]] = {"build": build, "inspect": inspect}
