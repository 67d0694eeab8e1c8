"""Count a training step of this package and of TRL, without computing it.

    python -m benchmarks.counted OUT.jsonl --gsm8k train.jsonl --tokenizer gpt2
    python -m benchmarks.counted OUT.jsonl          pairs of random tokens with MetaMath's and UltraFeedback's lengths
    python -m benchmarks.counted OUT.jsonl --cases Llama-3.2-1B --sides trl flat

Models have their published sizes and no weights; batches are of 8 pairs, both trainers' default, in bf16 with gradient
checkpointing, also both's. The same command gives the same figures on every machine.
"""

import argparse
import itertools
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpop_trainer.batches.choose_layout import tree_obstacle
from dpop_trainer.models.tokenizer_loading import load_tokenizer, prepare_tokenizer
from dpop_trainer.tools.pairs.metamath import build_pairs

from benchmarks import records
from benchmarks.counted.cases import CASES, Case
from benchmarks.counted.sides import LAYOUTS, TRL, Count, count_step
from benchmarks.layout_counts import read_lines, tokenised
from benchmarks.shapes import METAMATH, ULTRAFEEDBACK, PairShape, make_pairs

PAIRS_PER_BATCH = 8
NUM_BATCHES = 4
MAX_LENGTH = 512
"""Of GSM8K's pairs, of which none drawn is cut. Gemma-3's window: longer pairs cannot share a row there."""
FEW_LAYERS = (2, 3)
SMALLEST_VOCAB_SIZE = 32000
"""Random tokens are below it, whatever the model."""
DEFAULT_SIDES = (TRL, "rows", "flat")
"""TRL; the same rows with this package's head; what `auto` takes on a GPU."""


def random_records(shape: PairShape, num_pairs: int) -> list[dict[str, Any]]:
    """Tokenised pairs of random tokens."""
    pairs = make_pairs(shape, num_pairs, SMALLEST_VOCAB_SIZE)
    return [{**pair._asdict(), "pair_id": i} for i, pair in enumerate(pairs)]


def gsm8k_records(source: Path, tokenizer_path: str, num_pairs: int) -> list[dict[str, Any]]:
    """GSM8K's answers against themselves with one number changed, tokenised, in a random order."""
    tokenizer = load_tokenizer(tokenizer_path)
    prepare_tokenizer(tokenizer)
    problems = read_lines(source)
    random.Random(0).shuffle(problems)
    pairs = list(itertools.islice(build_pairs(problems, seed=0), num_pairs))
    return tokenised(pairs, tokenizer, MAX_LENGTH)


def count_batch(case: Case, side: str, batch: list[dict[str, Any]]) -> Count:
    """A step of the whole model; with LoRA and equal layers from two models of a few, since each layer adds the same.

    Where all weights are trained, the worst moment of a few layers is another than that of many.
    """
    if not (case.has_equal_layers and case.lora):
        return count_step(side, *case.models(), batch, checkpointing=True)
    few, more = (count_step(side, *case.models(depth), batch, checkpointing=True) for depth in FEW_LAYERS)
    return few.carried_on(more, (case.config.num_hidden_layers - FEW_LAYERS[0]) // (FEW_LAYERS[1] - FEW_LAYERS[0]))


def total(counts: list[Count]) -> dict[str, float]:
    """Of several steps: sums, and the highest of what is held."""
    held = {"peak_bytes", "weight_bytes"}
    return {name: (max if name in held else sum)(asdict(count)[name] for count in counts) for name in asdict(counts[0])}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.counted", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON lines; records are appended")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl, with --tokenizer")
    parser.add_argument("--tokenizer", help="folder or hub id of a tokenizer, GPT-2's for the committed records")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--sides", nargs="*", choices=(TRL, *LAYOUTS), default=DEFAULT_SIDES, metavar="SIDE")
    options = parser.parse_args(argv)
    if (options.gsm8k is None) != (options.tokenizer is None):
        parser.error("expected --gsm8k and --tokenizer together, got one of them.")
    num_pairs = NUM_BATCHES * PAIRS_PER_BATCH
    data = {shape.name: random_records(shape, num_pairs) for shape in (METAMATH, ULTRAFEEDBACK)}
    if options.gsm8k is not None:
        data = {"GSM8K": gsm8k_records(options.gsm8k, options.tokenizer, num_pairs), **data}
    versions = {name: records.version(name) for name in ("torch", "transformers", "peft", "trl")}
    for name, (data_name, pairs), side in itertools.product(options.cases, data.items(), options.sides):
        start, case = time.monotonic(), CASES[name]
        longest = max(
            len(pair["prompt_ids"]) + len(pair[ids]) for pair in pairs for ids in ("chosen_ids", "rejected_ids")
        )
        obstacle = tree_obstacle(case.models(FEW_LAYERS[0])[0], max_length=longest)
        if obstacle is not None and side not in (TRL, "rows"):
            print(f"{name}, {data_name}, {side}: left out, {obstacle}")
            continue
        batches = [pairs[i : i + PAIRS_PER_BATCH] for i in range(0, num_pairs, PAIRS_PER_BATCH)]
        counts = [count_batch(case, side, batch) for batch in batches]
        figures = total(counts)
        common = {"benchmark": "counted", "case": name, "tuning": case.tuning, "data": data_name, "side": side}
        sizes = {"num_batches": len(batches), "pairs_per_batch": PAIRS_PER_BATCH}
        records.append(options.out, {**common, **sizes, **figures, "versions": versions, "commit": records.commit()})
        flop = sum(figures[part] for part in ("body_flop", "attention_flop", "head_flop"))
        print(
            f"{name}, {data_name}, {side}: {flop / 1e12:.2f} TFLOP, of the head {figures['head_flop'] / 1e12:.2f}, "
            f"{(figures['peak_bytes'] - figures['weight_bytes']) / 2**30:.2f} GiB over the weights' "
            f"{figures['weight_bytes'] / 2**30:.2f} ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
