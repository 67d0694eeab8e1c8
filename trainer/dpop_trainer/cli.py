"""The console command `dpop`: one function per subcommand; anything heavy is imported by the one that needs it."""

import argparse
import sys
from collections.abc import Callable

USAGE = """usage: dpop COMMAND [options]

  train      preference fine-tuning: dpop train --config run.yaml [--any_field value]
  sft        supervised fine-tuning on the chosen answers, to start from: dpop sft --config run.yaml
  pairs      build low-edit preference pairs from solved problems: dpop pairs --source train.jsonl --out pairs.jsonl
  inspect    what training did to the chosen answers, token by token: dpop inspect --model RUN --pairs pairs.jsonl
  eval       benchmarks before and after training, one table: dpop eval --models BASE RUN --pairs held_out.jsonl
  mtbench    MT-Bench: dpop mtbench answer --model RUN ..., then dpop mtbench judge --endpoint URL ...
  export     merge a run's adapter, write a model card: dpop export RUN --out DIR [--push_to_hub ID]
  demo       DPO against DPOP on generated pairs, offline, in minutes: dpop demo

`dpop COMMAND --help` lists the options of one.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand -> exit code: 0 done, 1 the run failed on its input, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    command = COMMANDS.get(argv[0])
    if command is None:
        print(f"dpop: expected one of {', '.join(COMMANDS)}, got {argv[0]!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return command(argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"dpop {argv[0]}: {error}", file=sys.stderr)
        return 1


def train(argv: list[str]) -> int:
    from dpop_trainer.arguments import parse_arguments
    from dpop_trainer.config import DPOPConfig
    from dpop_trainer.runs import run_train

    run_train(*parse_arguments(DPOPConfig, argv, "dpop train"))
    return 0


def sft(argv: list[str]) -> int:
    from dpop_trainer.arguments import parse_arguments
    from dpop_trainer.config import SFTConfig
    from dpop_trainer.runs import run_sft

    run_sft(*parse_arguments(SFTConfig, argv, "dpop sft"))
    return 0


def pairs(argv: list[str]) -> int:
    from dpop_trainer.pairs.metamath import write_pairs

    parser = argparse.ArgumentParser(
        "dpop pairs", description="MetaMath-style pairs: the rejected answer has one intermediate result changed."
    )
    parser.add_argument("--source", required=True, help="JSONL with question and answer, such as GSM8K's train.jsonl")
    parser.add_argument("--out", required=True, help="JSONL to write: prompt, chosen, rejected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="read the first so many problems only")
    parser.add_argument("--question_field", default="question", help='field of the problem; MetaMathQA: "query"')
    parser.add_argument("--answer_field", default="answer", help='field of its solution; MetaMathQA: "response"')
    options = parser.parse_args(argv)
    counts = write_pairs(
        options.source,
        options.out,
        seed=options.seed,
        limit=options.limit,
        question_field=options.question_field,
        answer_field=options.answer_field,
    )
    print(counts)
    return 0


def inspect(argv: list[str]) -> int:
    from dpop_trainer.runs import run_inspect

    parser = argparse.ArgumentParser(
        "dpop inspect", description="Hold a trained model against its reference on preference pairs."
    )
    parser.add_argument("--model", required=True, help="folder of the trained model or adapter, or a hub id")
    parser.add_argument("--ref_model", help="its reference; default: the base model under the adapter")
    parser.add_argument("--pairs", required=True, help="preference pairs: local file or hub id")
    parser.add_argument("--out", help="folder for shift.json and shift.png; default: the model's own folder")
    parser.add_argument("--limit", type=int, default=256, help="look at the first so many pairs (default 256)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=1024)
    options = parser.parse_args(argv)
    run_inspect(**vars(options))
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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "sft": sft,
    "pairs": pairs,
    "inspect": inspect,
    "eval": evaluate,
    "mtbench": mtbench,
    "export": export,
    "demo": demo,
}
