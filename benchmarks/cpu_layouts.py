"""Measure the layouts on a CPU: tokens computed on GSM8K low-edit pairs, and a training step in each layout.

    python -m benchmarks.cpu_layouts GSM8K/train.jsonl TOKENIZER OUT.json [--arc ARC-Challenge.jsonl]

One step is the reference's forward, the policy's forward and backward, and AdamW, on a small random Llama. The layouts
take turns on the same batches. Before anything is timed their losses and gradients are compared: a wrong result stops
the run. "rows, scored twice" is what a trainer does that knows nothing of a pair's common tokens.

Tokens are also counted, without training, for batches filled to a budget of positions, pairs of a prompt apart and
together: of the same pairs, of GSM8K with several corruptions per problem, and of ARC, the right answer against each
wrong one.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from dpop_trainer.data import Budget, PairCollator, plan_batches, tokenise_pairs
from dpop_trainer.flat_attention import use_flat_attention
from dpop_trainer.layout import forward_inputs
from dpop_trainer.loading import load_tokenizer, prepare_tokenizer
from dpop_trainer.pairs.metamath import build_pairs
from dpop_trainer.reference import frozen_copy, reference_segment_logps
from transformers import LlamaConfig, LlamaForCausalLM

from dpop_kernels import ScoringHead, pair_loss

AGREEMENT = 1e-4
"""Largest relative difference of loss and gradient norm between layouts, in fp32."""


BUDGET = 4096
"""Positions of a batch in the counts of batches by budget."""


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
        collator = PairCollator(pad_token_id=pad_token_id, layout=layout, hidden_size=hidden_size)  # type: ignore[arg-type]
        batches = plan_batches(
            dataset,
            Budget(BUDGET, layout),  # type: ignore[arg-type]
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


class Step:
    """One DPOP training step in one layout, on a policy of its own."""

    def __init__(self, collator: PairCollator, config: LlamaConfig) -> None:
        self.collator = collator
        torch.manual_seed(0)
        self.policy = LlamaForCausalLM(config)
        self.reference = frozen_copy(LlamaForCausalLM(config))  # another model: no pair is at the hinge's tie
        if collator.layout == "flat":
            use_flat_attention(self.policy)
            use_flat_attention(self.reference)
        self.head, self.reference_head = ScoringHead(self.policy), ScoringHead(self.reference)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5)

    def loss(self, records: list[dict[str, Any]]) -> torch.Tensor:
        batch = self.collator(records)
        inputs: dict[str, Any] = forward_inputs(batch, self.policy)
        reference = reference_segment_logps(self.reference_head, self.reference, batch, inputs, "auto")
        logps = self.head.token_logps(self.policy, batch["score_positions"], batch["target_ids"], **inputs)
        return pair_loss(logps, batch["cu_seqlens"], reference).losses.mean()

    def __call__(self, records: list[dict[str, Any]]) -> None:
        self.optimizer.zero_grad()
        self.loss(records).backward()
        self.optimizer.step()

    def loss_and_gradient_norm(self, records: list[dict[str, Any]]) -> tuple[float, float]:
        self.optimizer.zero_grad()
        loss = self.loss(records)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def check(steps: dict[str, Step], records: list[dict[str, Any]]) -> None:
    """
    Raises:
        AssertionError: a layout's loss or gradient norm is not that of rows.
    """
    expected = steps["rows"].loss_and_gradient_norm(records)
    for name, step in steps.items():
        for value, truth in zip(step.loss_and_gradient_norm(records), expected, strict=True):
            assert abs(value - truth) <= AGREEMENT * abs(truth), (name, value, truth)


def time_in_turns(steps: dict[str, Callable], batches: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Seconds of each step on each batch; the first batch warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for records in batches:
        for name, step in steps.items():
            start = time.perf_counter()
            step(records)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("tokenizer", help="folder or hub id of the tokenizer, GPT-2's for the recorded figures")
    parser.add_argument("out", type=Path, help="the record, JSON")
    parser.add_argument("--num_pairs", type=int, default=512, help="pairs whose tokens are counted")
    parser.add_argument("--num_steps", type=int, default=6, help="timed steps of each layout")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=4, help="of the model: how much of a step is not the head")
    parser.add_argument("--hidden_size", type=int, default=256, help="of the model, a multiple of 64")
    parser.add_argument("--arc", type=Path, help="ARC's questions, JSONL, for the counts")
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.tokenizer)
    prepare_tokenizer(tokenizer)
    problems = read_lines(arguments.source)
    pairs = list(itertools.islice(build_pairs(problems, seed=0), arguments.num_pairs))
    records = tokenised(pairs, tokenizer, arguments.max_length)
    size = arguments.batch_size
    batches = [records[start : start + size] for start in range(0, len(records) - size + 1, size)]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 43 // 16,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=arguments.hidden_size // 64,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    rows = PairCollator(pad_token_id=tokenizer.pad_token_id)  # type: ignore[arg-type]
    collators = {
        "rows, scored twice": PairCollator(pad_token_id=rows.pad_token_id, prefix_sharing=False),
        "rows": rows,
        "tree, prompt shared": PairCollator(pad_token_id=rows.pad_token_id, layout="tree", prefix_sharing=False),
        "tree": PairCollator(pad_token_id=rows.pad_token_id, layout="tree"),
        "packed": PairCollator(pad_token_id=rows.pad_token_id, layout="packed", hidden_size=config.hidden_size),
        "flat": PairCollator(pad_token_id=rows.pad_token_id, layout="flat"),
    }
    steps = {name: Step(collator, config) for name, collator in collators.items()}
    check(steps, batches[0])
    seconds = time_in_turns(steps, batches[: arguments.num_steps + 1])
    sets = {"GSM8K": records}
    sets["GSM8K, several corruptions"] = tokenised(
        several_corruptions(problems, arguments.num_pairs // 2), tokenizer, arguments.max_length
    )
    if arguments.arc:
        sets["ARC, right against wrong"] = tokenised(
            right_against_wrong(read_lines(arguments.arc)), tokenizer, arguments.max_length
        )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    record = {
        "case": "layouts_gsm8k_low_edit",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "num_pairs": len(records),
        "batch_size": size,
        "num_steps": len(seconds["rows"]),
        "model": {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
        },
        "layouts": {
            name: {
                **count(collator, batches),
                "median_step_seconds": median[name],
                "fastest_step_seconds": min(seconds[name]),
                "slowest_step_seconds": max(seconds[name]),
                "speed_against_rows": median["rows"] / median[name],
            }
            for name, collator in collators.items()
        },
        "budget": {
            "max_positions": BUDGET,
            "sets": {
                name: {
                    "num_pairs": len(part),
                    "layouts": count_by_budget(part, tokenizer.pad_token_id, config.hidden_size),
                }
                for name, part in sets.items()
            },
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    for name, figures in record["layouts"].items():
        print(
            f"{name:20} {figures['computed_ratio']:.3f} of the tokens, {figures['padding_share']:.1%} padding, "
            f"{figures['median_step_seconds']:.3f} s a step, {figures['speed_against_rows']:.2f} x rows"
        )
    for name, part in record["budget"]["sets"].items():
        for layout, figures in part["layouts"].items():
            print(
                f"{name}, {layout}: {figures['computed_ratio']:.3f} of the tokens, {figures['padding_share']:.1%} "
                f"padding, {figures['num_batches']} batches"
            )


if __name__ == "__main__":
    main()
