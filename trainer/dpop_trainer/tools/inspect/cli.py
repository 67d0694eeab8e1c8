"""The options of `dpop inspect`."""

from dpop_trainer.data.source_path import check_source_path, expanded
from dpop_trainer.settings.command_parser import CommandParser
from dpop_trainer.settings.model_folder import check_reads
from dpop_trainer.settings.model_paths import check_trained_path
from dpop_trainer.settings.under_way import LIBRARIES, under_way


def main(argv: list[str]) -> int:
    """Parse, look for what is named, inspect."""
    options = vars(_parser().parse_args(argv))
    check_trained_path(options["model"])
    check_source_path(options["pairs"])
    check_reads(options["model"], options["pairs"])
    if options["ref_model"]:
        check_trained_path(options["ref_model"])
    if options["out"] and expanded(options["out"]).is_file():
        raise ValueError(f"out: expected a folder, got the file {options['out']!r}. Choose another.")
    with under_way(LIBRARIES):
        from dpop_trainer.tools.inspect.inspection import run_inspect

    run_inspect(**options)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "dpop inspect", description="Hold a trained model against its reference on preference pairs, token by token."
    )
    parser.add_argument("model", help="folder of a run, a model or an adapter, or a hub id")
    parser.add_argument("--pairs", required=True, help="preference pairs: local file or hub id")
    parser.add_argument(
        "--ref_model", help="its reference; default: what the run started from, or the base model under the adapter"
    )
    parser.add_argument("--out", help="folder for inspect.html, inspect.json and figures; default: the model's own")
    parser.add_argument("--limit", type=int, default=256, help="look at the first so many pairs (default 256)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, help="cut pairs to so many tokens; default: as the run did, or 1024")
    parser.add_argument("--num_worst", type=int, default=8, help="show so many of the pairs that lost most (default 8)")
    parser.add_argument(
        "--no_checkpoints", dest="checkpoints", action="store_false", help="leave the run's checkpoints out"
    )
    return parser
