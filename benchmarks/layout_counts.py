"""Count what the layouts compute, without training: tokens and padding in batches filled to a budget of positions.

    python -m benchmarks.layout_counts GSM8K/train.jsonl ARC-Challenge.jsonl TOKENIZER OUT.json

Three sets of pairs: GSM8K with one corruption per problem, GSM8K with several, and ARC, the right answer against each
wrong one. In the latter two pairs share their prompt and their chosen answer; batches hold them apart and together.
"""

import argparse
import itertools
import json
import random
import subprocess
from pathlib import Path
from typing import Any

from datasets import Dataset
from dpop_trainer.batches import Budget, PairCollator, plan_batches
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.models.tokenizer_loading import load_tokenizer, prepare_tokenizer
from dpop_trainer.tools.pairs.metamath import build_pairs

BUDGET = 4096
"""Positions of a batch."""


def read_lines(source: Path) -> list[dict[str, Any]]:
    with source.open() as lines:
        return [json.loads(line) for line in lines]


def tokenised(pairs: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Pairs as records for a collator, in a random order."""
    dataset, _ = tokenise_pairs(Dataset.from_list(pairs), tokenizer, max_length=max_length)
    records = dataset.to_list()
    random.Random(0).shuffle(records)
    return records


def several_corruptions(problems: list[dict[str, Any]], num_problems: int) -> list[dict[str, Any]]:
    """Up to four different rejected answers to each of the first problems."""
    pairs = (pair for seed in range(4) for pair in build_pairs(problems[:num_problems], seed=seed))
    return list({(pair["prompt"], pair["rejected"]): pair for pair in pairs}.values())


def right_against_wrong(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Multiple-choice questions -> a pair of the right answer and each wrong one."""
    return [
        {"prompt": f"Question: {question['question']}\nAnswer:", "chosen": f" {right}", "rejected": f" {text}"}
        for question in questions
        for right in [question["choices"]["text"][question["choices"]["label"].index(question["answerKey"])]]
        for text in question["choices"]["text"]
        if text != right
    ]


def count(collator: PairCollator, batches: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Tokens over all batches, and how much of what is computed they are."""
    logical = computed = positions = 0
    for records in batches:
        batch = collator(records)
        logical += int(batch["token_counts"][0])
        computed += int(batch["token_counts"][1])
        positions += batch["input_ids"].numel()
    return {
        "logical_tokens": logical,
        "computed_tokens": computed,
        "computed_ratio": computed / logical,
        "padding_share": (positions - computed) / positions,
    }


def count_by_budget(records: list[dict[str, Any]], pad_token_id: int, hidden_size: int) -> dict[str, dict[str, float]]:
    """Tokens in batches filled to the budget, by layout."""
    dataset = Dataset.from_list(records)
    counts = {}
    for layout, group_by_prompt in (
        ("rows", False),
        ("tree", False),
        ("packed", True),
        ("flat", False),
        ("flat", True),
    ):
        collator = PairCollator(pad_token_id=pad_token_id, layout=layout, hidden_size=hidden_size)
        batches = plan_batches(
            dataset,
            Budget(BUDGET, layout),
            prefix_sharing=True,
            group_by_prompt=group_by_prompt,
            seed=0,
            num_processes=1,
            num_epochs=1,
        )
        figures = count(collator, [[records[i] for i in batch] for batch in batches])
        positions = figures["computed_tokens"] / (1 - figures["padding_share"])
        name = f"{layout}, prompts together" if group_by_prompt else layout
        counts[name] = {**figures, "num_batches": len(batches), "budget_filled": positions / len(batches) / BUDGET}
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gsm8k", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("arc", type=Path, help="ARC's questions, JSONL")
    parser.add_argument("tokenizer", help="folder or hub id of the tokenizer, GPT-2's for the recorded figures")
    parser.add_argument("out", type=Path, help="the record, JSON")
    parser.add_argument("--num_pairs", type=int, default=512, help="of the first set")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument(
        "--hidden_size", type=int, default=2048, help="of the model, which packed rows weigh attention by"
    )
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.tokenizer)
    prepare_tokenizer(tokenizer)
    problems = read_lines(arguments.gsm8k)
    sets = {
        "GSM8K": list(itertools.islice(build_pairs(problems, seed=0), arguments.num_pairs)),
        "GSM8K, several corruptions": several_corruptions(problems, arguments.num_pairs // 2),
        "ARC, right against wrong": right_against_wrong(read_lines(arguments.arc)),
    }
    record: dict[str, Any] = {
        "case": "layout_counts",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "max_positions": BUDGET,
        "hidden_size": arguments.hidden_size,
        "sets": {},
    }
    for name, pairs in sets.items():
        records = tokenised(pairs, tokenizer, arguments.max_length)
        layouts = count_by_budget(records, tokenizer.pad_token_id, arguments.hidden_size)  # type: ignore[arg-type]
        record["sets"][name] = {"num_pairs": len(records), "layouts": layouts}
        for layout, figures in layouts.items():
            print(
                f"{name}, {layout}: {figures['computed_ratio']:.3f} of the tokens, {figures['padding_share']:.1%} "
                f"padding, {figures['num_batches']} batches"
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
