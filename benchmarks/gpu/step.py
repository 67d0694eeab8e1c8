"""A LoRA step on pairs like GSM8K's: flat rows against TRL, both with the batch that is their default."""

import random
from typing import Any

import torch

from benchmarks import records, scale
from benchmarks.gpu import predicted
from benchmarks.gpu.trainers import GIB, Plan, checked, pair_of_words, train
from benchmarks.gpu.work import Work
from benchmarks.random_base import llama_config
from benchmarks.shapes import model_size

TINY = scale.ModelSize(300, 64, 96, 2, 4, 2)
PAIRS_PER_STEP = 8
PROMPT, ANSWER = 90, 125
"""Median tokens of GSM8K's questions and worked answers."""
SPREAD = 0.3
"""Of the logarithm of a length."""
BLOCK = 128
"""Flat rows on CUDA come in whole blocks."""
RANK = 16


def run(work: Work, name: str) -> None:
    """One trainer on one model: `MODEL/CANDIDATE`."""
    model, candidate = name.split("/")
    size = TINY if work.rehearse else model_size(model)
    plan = low_edit_plan(size.vocab_size, rehearse=work.rehearse)
    truth = work.found(f"{model}/{'flat' if candidate == 'trl' else 'trl'}")

    def measure() -> dict[str, Any]:
        torch.manual_seed(0)
        fields = train(candidate, random_llama(size, plan.max_length, work), plan, work)
        fields = checked(fields, truth, rehearse=work.rehearse)
        return fields | as_level(model, candidate, fields)

    work.measure(name, measure, predicted=predict(size, plan, candidate), is_ours=candidate != "trl")


def random_llama(size: scale.ModelSize, max_length: int, work: Work) -> Any:
    """A Llama of random weights, made where it stays."""
    from transformers import AutoModelForCausalLM

    with work.device:
        return AutoModelForCausalLM.from_config(llama_config(size, 2 * max_length), dtype=work.dtype)


def low_edit_plan(vocab_size: int, *, rehearse: bool) -> Plan:
    """Pairs whose answers differ in one token of the later half, for all steps."""
    generator = random.Random(0)
    num_warm_up, num_steps, divisor = (1, 2, 10) if rehearse else (4, 12, 1)
    pairs_per_step = 3 if rehearse else PAIRS_PER_STEP

    def length(median: int) -> int:
        return max(2, round(median / divisor * generator.lognormvariate(0, SPREAD)))

    pairs = []
    for _ in range((num_warm_up + num_steps) * pairs_per_step):
        prompt, answer = length(PROMPT), length(ANSWER)
        edit = generator.randrange(answer // 2, answer)
        pairs.append(pair_of_words(prompt, answer, edit, vocab_size, generator))
    return Plan(pairs, pairs_per_step, vocab_size, 1024, 4 if rehearse else RANK, num_warm_up)


def batch_of(pairs: list[dict[str, str]], candidate: str) -> scale.Batch:
    """What a trainer computes of one step's pairs: two padded rows each, or each shared token once; an EOS ends an
    answer."""
    sides = [[pair[side].split() for side in ("prompt", "chosen", "rejected")] for pair in pairs]
    num_scored = sum(len(chosen) + len(rejected) + 2 for _, chosen, rejected in sides)
    if candidate in ("trl", "rows"):
        longest = max(len(prompt) + max(len(chosen), len(rejected)) + 1 for prompt, chosen, rejected in sides)
        return scale.Batch(2 * len(pairs), longest, num_scored)
    shared = sum(
        next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
        for _, chosen, rejected in sides
    )
    positions = sum(len(prompt) for prompt, *_ in sides) + num_scored - shared
    return scale.Batch(1, positions, num_scored - shared)


def predict(size: scale.ModelSize, plan: Plan, candidate: str) -> dict[str, Any]:
    """Seconds of the products of the first step that counts, at an H200's rate, and GiB."""
    first = plan.num_warm_up * plan.pairs_per_step
    batch = batch_of(plan.pairs[first : first + plan.pairs_per_step], candidate)
    training = scale.Training(lora_rank=plan.lora_rank, head="recomputed" if candidate == "trl" else "fused")
    flop = scale.step_flop(size, training, batch).total
    if candidate not in ("trl", "rows"):  # scores of one row as if all of it saw all: a pair sees its own tokens alone
        whole = scale.step_flop(size, training, batch)
        flop = whole.total - whole.attention * (1 - 1 / plan.pairs_per_step)
    return {
        "seconds": predicted.seconds(flop=flop),
        "tflop": flop / 1e12,
        "gib": scale.step_memory(size, training, batch).total / GIB,
    }


def as_level(model: str, candidate: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What makes it a record of the level "step" in docs/benchmarks.md."""
    is_trl = candidate == "trl"
    peak = fields.get("peak_gib")
    return {
        "level": "step",
        "task": "lora",
        "shape": {"name": model, "pairs": "GSM8K-like", "num_pairs": PAIRS_PER_STEP},
        "dtype": "bfloat16",
        "peer": "TRL" if is_trl else f"dpop-kernels, {candidate}",
        "peer_version": records.version("trl" if is_trl else "dpop-kernels"),
        "settings": "DPOTrainer" if is_trl else f"DPOPTrainer, layout {candidate}",
        "peak_bytes": None if peak is None else int((peak - fields["weights_gib"]) * GIB),
        "errors": {},
    }
