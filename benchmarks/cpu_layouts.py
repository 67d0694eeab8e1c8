"""Measure the layouts on a CPU: tokens computed on GSM8K low-edit pairs, and a training step in each layout.

    python -m benchmarks.cpu_layouts GSM8K/train.jsonl TOKENIZER OUT.json

One step is the reference's forward, the policy's forward and backward, and AdamW, on a small random Llama. The layouts
take turns on the same batches. Before anything is timed their losses and gradients are compared: a wrong result stops
the run. "rows, scored twice" is what a trainer does that knows nothing of a pair's common tokens.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from dpop_trainer.batches import PairCollator
from dpop_trainer.batches.flat_attention import use_flat_attention
from dpop_trainer.batches.scoring import ScoredModel, forward_inputs
from dpop_trainer.models.tokenizer_loading import load_tokenizer, prepare_tokenizer
from dpop_trainer.reference import frozen_copy, reference_segment_logps
from dpop_trainer.tools.pairs.metamath import build_pairs
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.layout_counts import count, read_lines, tokenised
from dpop_kernels import ScoringHead, pair_loss

AGREEMENT = 1e-4
"""Largest relative difference of loss and gradient norm between layouts, in fp32."""


class Step:
    """One DPOP training step in one layout, on a policy of its own."""

    def __init__(self, collator: PairCollator, config: LlamaConfig) -> None:
        self.collator = collator
        config = copy.deepcopy(config)  # which names the attention, and models keep the one that they are given
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
        inputs = forward_inputs(batch, self.policy)
        reference = reference_segment_logps(self.reference_head, self.reference, batch, inputs, "auto")
        logps = ScoredModel(self.policy, self.head).token_logps(batch, inputs)
        return pair_loss(logps, batch.cu_seqlens, reference).losses.mean()

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


def time_in_turns(steps: Mapping[str, Callable], batches: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
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
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    for name, figures in record["layouts"].items():
        print(
            f"{name:20} {figures['computed_ratio']:.3f} of the tokens, {figures['padding_share']:.1%} padding, "
            f"{figures['median_step_seconds']:.3f} s a step, {figures['speed_against_rows']:.2f} x rows"
        )


if __name__ == "__main__":
    main()
