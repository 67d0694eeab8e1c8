"""The longest pair that can be trained on in 79 GiB, beside what `dpop plan` says.

    python -m benchmarks.gpu.longest Llama-3-8B Gemma-3-1B    plans ahead, without a GPU -> results/longest_planned.json

TRL publishes gemma-3-1b's in as much (`benchmarks/published.py`). A third of a sequence is the prompt, a third what
both answers begin with.
"""

import gc
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dpop_trainer.tools.plan.known_models import known_config
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks import records
from benchmarks.gpu import step
from benchmarks.gpu.trainers import Plan, pair_of_words, train
from benchmarks.gpu.work import Work
from benchmarks.random_base import llama_config
from benchmarks.shapes import gemma_3_1b

RANK = 16


class Case(NamedTuple):
    """A model, and whether LoRA is trained or all its weights."""

    config: PreTrainedConfig
    lora: bool


CASES = {
    "Llama-3-8B": Case(known_config("Llama-3-8B"), lora=True),
    "Gemma-3-1B": Case(gemma_3_1b(), lora=False),
}
LAYOUTS = {"Llama-3-8B": "flat", "Gemma-3-1B": "rows"}
"""Gemma's windows of attention let it run neither trees nor flat rows."""
LIMIT_GIB = 79
PRECISION = 0.05
"""Of the length, to which it is found."""
PLANNED = records.RESULTS / "longest_planned.json"


def run(work: Work, name: str) -> None:
    """One model, from a quarter of what is expected upwards."""
    case = CASES[name]
    config = llama_config(step.TINY, 4096) if work.rehearse else case.config
    planned = 128 if work.rehearse else expected(name)
    if work.device.type == "cuda":
        total = torch.cuda.get_device_properties(work.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_GIB * 2**30 / total))
    last: dict[str, float] = {}

    def fits(length: int) -> bool | None:
        if work.rehearse and length > planned:
            return False  # a CPU's memory has no limit to look for
        # attention's part of the time grows with the square
        least = last["seconds"] * (length / last["length"]) ** 2 if last else 0.0
        record = work.measure(
            f"{name}, {length} tokens",
            lambda: one_step(work, config, length, RANK if case.lora else None, LAYOUTS[name]),
            predicted={"fits": length <= planned, "seconds": least or None},
            least=least,
        )
        if "median_s" in record:
            last.update(seconds=record["median_s"], length=length)
        return None if "skipped" in record or "failed" in record else "median_s" in record

    low, high = longest(fits, max(16, planned // 4))
    work.write(name, predicted={"tokens": planned}, longest_tokens=low, too_long_tokens=high, limit_gib=LIMIT_GIB)


def expected(name: str) -> int:
    """What `dpop plan` said."""
    return json.loads(PLANNED.read_text())[name]


def longest(fits: Callable[[int], bool | None], start: int) -> tuple[int, int | None]:
    """By doubling, then halving what is between: the longest that fitted, 0 if none, and the shortest that did not.

    Args:
        fits: whether a length does; None ends the search.
        start: the first that is tried.
    """
    low, high, length = 0, None, start
    while length and (answer := fits(length)) is not None:
        low, high = (length, high) if answer else (low, length)
        if high is None:
            length = 2 * low
        else:
            length = (low + high) // 2 if high - low > max(1, PRECISION * low) else 0
    return low, high


def one_step(work: Work, config: PreTrainedConfig, length: int, rank: int | None, layout: str) -> dict[str, Any]:
    """A step on one pair of so many tokens; or that memory was short."""
    torch.manual_seed(0)
    answer = 2 * length // 3
    pair = pair_of_words(length - 1 - answer, answer, answer // 2, config.vocab_size, random.Random(0))
    plan = Plan([pair], 1, config.vocab_size, length, rank, num_warm_up=0)
    config.max_position_embeddings = max(length, config.max_position_embeddings)
    try:
        with work.device:
            model = AutoModelForCausalLM.from_config(config, dtype=work.dtype)
        return train(layout, model, plan, work)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        model = None
        gc.collect()
        if work.device.type == "cuda":
            torch.cuda.empty_cache()


def plan_ahead(name: str) -> int:
    """Tokens of the longest pair by `dpop plan`, at the same setting."""
    from dpop_trainer.tools.plan.search import longest_pair

    case = CASES[name]
    return longest_pair(*planner_of(case.config, LAYOUTS[name], lora=case.lora))


def planner_of(config: PreTrainedConfig, layout: str, *, lora: bool) -> tuple[Any, Any]:
    """`dpop plan`'s own planner of one pair per step, in this part's proportions, and its choice."""
    from dpop_trainer.tools.plan.options import parse_plan
    from dpop_trainer.tools.plan.setup import make_planner

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config.to_dict()))
        asked = ["--model", str(path), "--dtype", "bfloat16", "--layout", layout]
        asked += ["--memory", str(LIMIT_GIB), "--tflops", "989", "--bandwidth", "4300"]
        asked += ["--prompt_tokens", "1000", "--answer_tokens", "2000", "--shared_tokens", "1000"]
        asked += ["--per_device_train_batch_size", "1", "--gradient_checkpointing", "true", "--max_length", "4096"]
        asked += ["--use_peft", "--lora_r", str(RANK), "--lora_target_modules", "all-linear"] if lora else []
        planner, choice, _ = make_planner(*parse_plan(asked))
    return planner, choice


if __name__ == "__main__":
    PLANNED.write_text(json.dumps({name: plan_ahead(name) for name in sys.argv[1:]}, indent=2) + "\n")
    print(PLANNED.read_text())
