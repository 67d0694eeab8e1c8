"""A step of a 72B model on one card: base in 4 bits, LoRA, one pair; flat rows and two rows per pair against TRL.

Needs bitsandbytes. The weights are random and made on the device (random_base.py); everything else is the trainer as a
user runs it. Running out of memory is a result, and is recorded as one.
"""

import random
import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import scale
from benchmarks.gpu import predicted
from benchmarks.gpu.step import batch_of
from benchmarks.gpu.trainers import GIB, Plan, checked, pair_of_words, train
from benchmarks.gpu.work import Work
from benchmarks.random_base import linear_bytes, random_base
from benchmarks.shapes import model_size

TINY = scale.ModelSize(320, 64, 128, 3, 4, 2)
CANDIDATES = {"flat": "DPOP, flat", "rows": "DPOP, rows", "trl": "TRL"}
TABLE = (("Qwen-72B", 1024), ("Qwen-72B", 8192), ("Yi-34B", 8192), ("Llama-3-8B", 8192))
"""What the report shows, of Smaug-72B's and Smaug-34B's bases and an 8B: shape, and tokens of each answer with its
prompt."""
NUM_TOKENS = 1024
RANK = 64
"""As in the recipe qwen-72b."""


def run(work: Work, name: str) -> None:
    """One trainer: `MODEL/CANDIDATE`."""
    from dpop_trainer.models.quantised import four_bit_config

    model, candidate = name.split("/")
    size = TINY if work.rehearse else model_size(model)
    plan = one_pair_plan(size.vocab_size, 24 if work.rehearse else NUM_TOKENS, rank=4 if work.rehearse else RANK)
    truth = next((found for other in CANDIDATES if (found := work.found(f"{model}/{other}"))), None)

    def measure() -> dict[str, Any]:
        torch.manual_seed(0)
        start = time.monotonic()
        base = random_base(
            size,
            four_bit_config(work.dtype, nested=True),
            device=work.device,
            dtype=work.dtype,
            max_length=2 * plan.max_length,
            seconds=work.left / 2,
        )
        making_s = time.monotonic() - start
        return checked(train(candidate, base, plan, work), truth, rehearse=work.rehearse) | {"making_s": making_s}

    paper = on_paper(size, plan, candidate)
    shape = {"model": model, "candidate": candidate, "num_tokens": plan.max_length, "size": asdict(size)}
    work.measure(name, measure, predicted=paper | shape, is_ours=candidate != "trl")


def one_pair_plan(vocab_size: int, num_tokens: int, *, rank: int) -> Plan:
    """The same pair in each of four steps: answers of two thirds of `num_tokens` with an EOS, one word in the middle
    changed."""
    answer = 2 * num_tokens // 3
    pair = pair_of_words(num_tokens - 1 - answer, answer, answer // 2, vocab_size, random.Random(0))
    return Plan([pair] * 4, 1, vocab_size, num_tokens, rank, num_warm_up=1)


def on_paper(size: scale.ModelSize, plan: Plan, candidate: str) -> dict[str, Any]:
    """GiB by part, the matrix products of a step, and their seconds at an H200's rate."""
    ends = size.vocab_size * size.hidden_size * (1 if size.tied_embeddings else 2) * 2  # in bf16
    weight_bytes = (linear_bytes(size, nested=True) + ends) / size.num_parameters
    training = scale.Training(
        lora_rank=plan.lora_rank, weight_bytes=weight_bytes, head="recomputed" if candidate == "trl" else "fused"
    )
    batch = batch_of(plan.pairs[:1], candidate)
    parts = asdict(scale.step_memory(size, training, batch))
    parts["widened"] = 2 * max(inputs * outputs for inputs, outputs in size.linear_shapes)  # one at a time, in bf16
    if candidate == "trl":
        parts["trained"] /= 2  # it keeps the adapter, and so Adam's moments, in bf16
    flop = scale.step_flop(size, training, batch).total
    # every pass reads the packed weights and writes them widened, then the product reads them
    widening = 4 * size.num_layers * size.layer_weights * (0.5 + 2)
    return {
        "seconds": predicted.seconds(flop=flop) + predicted.seconds(flop=0, num_bytes=widening),
        "tflop": flop / 1e12,
        "gib": sum(parts.values()) / GIB,
        "gib_by_part": {name: value / GIB for name, value in parts.items()},
    }
