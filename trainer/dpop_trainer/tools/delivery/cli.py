"""The options of `dpop export`."""

from dpop_trainer.settings.command_parser import CommandParser
from dpop_trainer.settings.model_paths import check_trained_path
from dpop_trainer.settings.under_way import LIBRARIES, under_way
from dpop_trainer.tools.delivery.inputs import check_out, check_shard_size, evaluation_file


def main(argv: list[str]) -> int:
    """Parse, look for what is named, export."""
    options = vars(_parser().parse_args(argv))
    check_trained_path(options["run"])
    if options["base"]:
        check_trained_path(options["base"])
    check_out(options["out"])
    check_shard_size(options["max_shard_size"])
    evaluation_file(options["evaluation"])
    with under_way(LIBRARIES):
        from dpop_trainer.tools.delivery.export import run_export

    run_export(options.pop("run"), **options)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "dpop export",
        description="A run as a folder that anyone can load: the adapter merged into its base, "
        "safetensors, tokenizer, chat template, and a model card from the run's records.",
    )
    parser.add_argument("run", help="output_dir of a run, a checkpoint in it, or a hub id")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--base", help="merge into this model; default: the base that the adapter names")
    parser.add_argument(
        "--merge_into",
        choices=["rounded", "full"],
        help="of a run on a 4-bit base: the base as training saw it, rounded (default), or its full-precision weights",
    )
    parser.add_argument("--dtype", help="dtype to merge and save in; default: that of the base's checkpoint")
    parser.add_argument("--license", dest="license_id", help="the hub's id of the licence; default: the base's")
    parser.add_argument("--name", help="the model's name on its card; default: the folder's")
    parser.add_argument("--evaluation", help="results.json of `dpop eval`, or its folder, for the card")
    parser.add_argument("--device", help="where to merge (default cpu)")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the weights")
    parser.add_argument("--push_to_hub", metavar="ID", help="upload the folder there; without this nothing is sent")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    return parser
