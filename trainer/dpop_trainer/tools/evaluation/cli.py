"""The options of `dpop eval`."""

import sys

from dpop_trainer.data.source_path import check_source_path
from dpop_trainer.settings.command_parser import CommandParser
from dpop_trainer.settings.model_folder import check_reads
from dpop_trainer.settings.model_paths import check_trained_path
from dpop_trainer.settings.terminal import say
from dpop_trainer.settings.under_way import LIBRARIES, under_way
from dpop_trainer.tools.evaluation.tasks import LEADERBOARD, SUITE, parse_tasks


def main(argv: list[str]) -> int:
    """Parse, look for what is named, evaluate, print the table."""
    options = vars(_parser().parse_args(argv))
    what = {name: options.pop(name) for name in ("models", "tasks", "local", "pairs", "pairs_split")}
    if not (what["tasks"] or what["local"] or what["pairs"]):
        what["tasks"] = [SUITE]
    parse_tasks(what["tasks"], what["local"], options["num_fewshot"])
    for model in what["models"]:
        check_trained_path(model)
    if what["pairs"]:
        check_source_path(what["pairs"])
        for model in what["models"]:
            check_reads(model, what["pairs"])
    with under_way(LIBRARIES):
        from dpop_trainer.report.terminal import Terminal
        from dpop_trainer.tools.evaluation.compare import as_text
        from dpop_trainer.tools.evaluation.run import EvalSettings, run_eval

    settings = EvalSettings(**options)
    comparison = run_eval(what.pop("models"), settings, **what)
    say(f"\n{as_text(comparison, Terminal.of(sys.stdout))}\n")
    say(f"Written: {settings.out}/results.md, {settings.out}/results.json")
    return 0


def _parser() -> CommandParser:
    shots = ", ".join(f"{name} {task.num_fewshot}" for name, task in LEADERBOARD.items())
    parser = CommandParser(
        "dpop eval",
        description="Models before and after training on lm-eval's tasks and on held-out pairs, in one table. A "
        "finished result is not run again.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        help="folders or hub ids, models or adapters (not merged); differences are to the first",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        help=f"names of lm-eval; {SUITE} (the default where nothing else is asked for) is: {shots}",
    )
    parser.add_argument(
        "--local",
        nargs="+",
        metavar="NAME=FILE",
        help="lm-eval's task on questions from a local file; NAME.examples=FILE: its few-shot examples",
    )
    parser.add_argument("--pairs", help="held-out preference pairs, local file or hub id: accuracy and chosen Δ")
    parser.add_argument("--pairs_split", default="train", help="split of the pairs, where there are several")
    parser.add_argument("--out", default="runs/eval", help="folder of the results (default runs/eval)")
    parser.add_argument("--limit", type=int, help="the first so many questions only: a trial")
    parser.add_argument("--num_fewshot", type=int, help="other shots than the task's own")
    parser.add_argument("--apply_chat_template", action="store_true", help="prompts as conversations")
    parser.add_argument("--batch_size", default="8", help='a number or "auto" (default 8)')
    parser.add_argument("--max_length", type=int, help="longest input in tokens; default: the model's limit")
    parser.add_argument("--dtype", help="dtype to load in; default: the checkpoint's own")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the GPU if there is one")
    parser.add_argument("--device_map", help='"auto" spreads a large model over all GPUs')
    parser.add_argument("--load_in_4bit", action="store_true", help="the base in 4 bits, as QLoRA trained on it (CUDA)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the weights")
    return parser
