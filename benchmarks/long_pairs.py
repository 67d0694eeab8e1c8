"""Pairs that were meant to fit one device, on paper: whole MLPs, tiles of them, and checkpoints in the host's memory.

    python -m benchmarks.long_pairs [Gemma-3-1B ...]    asks `dpop plan` -> results/long_pairs.json, a minute each

Nothing here was measured.
"""

import json
import sys
from dataclasses import replace
from typing import NamedTuple

from benchmarks import records
from benchmarks.levels import table

PLANNED = records.RESULTS / "long_pairs.json"
GIB = 1 << 30
SETTINGS = {
    "whole": {},
    "tiles": {"tiled_mlp": "auto"},
    "tiles, offloaded": {"tiled_mlp": "auto", "offloading": True},
}


class Case(NamedTuple):
    """A model, how it is trained, one pair of so many tokens, and what it is to fit."""

    trained: str
    layout: str
    num_tokens: int
    gib: float
    attention: str | None = None
    bits: int | None = None


CASES = {
    "Gemma-3-1B": Case("all weights", "rows", 3 * 59392, 79.0, "flash_attention_2"),
    "Llama-3-8B": Case("LoRA", "flat", 150_000, 79.0),
    "Qwen2.5-72B": Case("QLoRA, 4 bits", "flat", 32768, 139.8, bits=4),
}
"""Gemma's windows of attention take neither trees nor flat rows, and sdpa has a mask of tokens by tokens for them."""


def planned(name: str) -> dict[str, float]:
    """GiB of a step on the pair, by setting."""
    from dpop_trainer.tools.plan.batches import Pairs, longest_record, stretched
    from dpop_trainer.tools.plan.known_models import SHAPES, known_config
    from dpop_trainer.tools.plan.planner import Planner

    from benchmarks.gpu.longest import planner_of
    from benchmarks.shapes import gemma_3_1b

    case = CASES[name]
    config = known_config(name) if name in SHAPES else gemma_3_1b()
    planner, choice = planner_of(config, case.layout, lora="LoRA" in case.trained)
    run = replace(planner.run, model=replace(planner.run.model, attention=case.attention))
    planner = Planner(run)
    pairs = Pairs([stretched(longest_record(run.pairs), case.num_tokens)], None, "", is_assumed=True)
    found = {}
    for setting, options in SETTINGS.items():
        outcome = planner.outcome(replace(choice, bits=case.bits, **options), pairs=pairs, exact_time=False)
        found[setting] = outcome.memory.total / GIB
    return found


def as_table() -> str:
    """docs/runs.md: what fits, and by which setting."""
    found = json.loads(PLANNED.read_text())["gib"]
    rows = []
    for name, case in CASES.items():
        attention = "" if case.attention is None else f", {case.attention}"
        cells = [f"{found[name][setting]:.1f}" for setting in SETTINGS]
        rows.append([f"{name}, {case.trained}{attention}", f"{case.num_tokens:,}", f"{case.gib:g}", *cells])
    return table(["one pair a step", "tokens of a sequence", "GiB of the device", *SETTINGS], rows)


def main(names: list[str]) -> int:
    found = json.loads(PLANNED.read_text())["gib"] if PLANNED.exists() else {}
    for name in names or CASES:
        found[name] = planned(name)
        versions = {name: records.version(name) for name in ("torch", "transformers")}
        PLANNED.write_text(json.dumps({"gib": found, "versions": versions}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
