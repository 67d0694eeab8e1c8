"""What peers have published of an H100, and ours beside it on paper.

    python -m benchmarks.published      asks `dpop plan`, without a GPU -> results/published_planned.json

Heads are arithmetic: products of 2·N·H·V FLOP at the rate that the peer's own bare products reached. Whole steps are
`dpop plan`'s, one pair at a time, a third of it prompt. Nothing here was measured by us.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.gpu import predicted
from benchmarks.levels import table

PLANNED = records.RESULTS / "published_planned.json"
GIB = 1 << 30
BF16 = 2


class Head(NamedTuple):
    """A published case: sizes, and milliseconds forward and backward by whom."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    published_ms: dict[str, float]
    """By peer; each makes the gradient of W."""
    bare_ms: float | None
    """Of three bare products of this size, where they were published."""


HEADS = {
    "[trl#7244](https://github.com/huggingface/trl/issues/7244)": Head(
        8192, 4096, 151936, {"TRL": 167, "Liger": 192}, 42
    ),
    "Liger's own, SM90": Head(16384, 4096, 131072, {"Liger": 104.8}, None),
}
OURS = {"frozen head": 2, "whole pairs, trainable": 3, "per token, trainable": 4}
"""Products forward and backward; the peers' cases make W's gradient as well, which a frozen head needs not."""
LENGTH = 8192
STEPS = {"LoRA": True, "all weights": False}
"""Of Gemma-3-1B, by whether LoRA is trained."""
PUBLISHED_STEP = {"longest_tokens": 59392, "gib": 12.00}
"""TRL's of gemma-3-1b: its longest pair in 79 GiB, and GiB with one of `LENGTH`."""


def heads() -> str:
    """docs/benchmarks.md: what our numbers of products come to at published sizes."""
    rows = []
    for name, head in HEADS.items():
        flop = 2.0 * head.num_tokens * head.hidden_size * head.vocab_size
        rate = 3 * flop / head.bare_ms * 1e3 if head.bare_ms else predicted.PRODUCTS
        published = ", ".join(f"{peer} {ms:g}" for peer, ms in head.published_ms.items())
        rows.append(
            [
                name,
                f"{head.num_tokens} × {head.hidden_size} × {head.vocab_size}",
                published + (f", bare {head.bare_ms:g}" if head.bare_ms else ""),
                *(f"{1e3 * products * flop / rate:.0f}" for products in OURS.values()),
                f"{rate / 1e12:.0f}",
                *(f"{held_bytes(head, trainable=trainable) / GIB:.1f}" for trainable in (False, True)),
            ]
        )
    titles = ["case", "N × H × V", "ms, published", *(f"ms, ours, {way}" for way in OURS), "at TFLOP/s"]
    return table([*titles, "GiB, frozen", "GiB, trainable"], rows)


def held_bytes(head: Head, *, trainable: bool) -> int:
    """Beside states and W in bf16: what forward or backward holds, and the gradients."""
    from dpop_kernels.backends.bounds import triton_bounds

    sizes = head.num_tokens, head.vocab_size, head.hidden_size, BF16
    states = head.num_tokens * head.hidden_size * BF16
    if not trainable:  # the gradient that the forward forms, and what the backward makes of it
        return triton_bounds().forward_bytes(*sizes, with_gradient=True) + 2 * states
    return triton_bounds().backward_bytes(*sizes) + states + head.vocab_size * head.hidden_size * BF16


def steps() -> str:
    """docs/benchmarks.md: the longest pair of Gemma-3-1B in 79 GiB."""
    planned = json.loads(PLANNED.read_text())["steps"]
    rows = [["TRL, published", f"{PUBLISHED_STEP['longest_tokens']:,}", f"{PUBLISHED_STEP['gib']:.2f} GiB"]]
    for way, found in planned.items():
        longest = "–" if found["longest_tokens"] is None else f"{found['longest_tokens']:,}"
        rows.append([f"ours, {way}, `dpop plan`", longest, f"{found['gib']:.2f} GiB"])
    return table(["Gemma-3-1B, one pair a step", "longest in 79 GiB", f"with {LENGTH:,} tokens"], rows)


def plan(*, lora: bool) -> Iterator[dict[str, Any]]:
    """GiB with a pair of `LENGTH` tokens; then, which takes minutes, the longest pair in 79 GiB as well."""
    from dpop_trainer.tools.plan.batches import Pairs, longest_record, stretched
    from dpop_trainer.tools.plan.search import longest_pair

    from benchmarks.gpu.longest import planner_of
    from benchmarks.shapes import gemma_3_1b

    planner, choice = planner_of(gemma_3_1b(), "rows", lora=lora)
    pairs = Pairs([stretched(longest_record(planner.run.pairs), LENGTH)], None, "", is_assumed=True)
    memory = planner.outcome(choice, pairs=pairs, exact_time=False).memory
    by_part = {part.name: part.num_bytes / GIB for part in memory.parts}
    found = {"gib": memory.total / GIB, "gib_by_part": by_part, "longest_tokens": None}
    yield found
    yield {**found, "longest_tokens": longest_pair(planner, choice)}


def main() -> int:
    versions = {name: records.version(name) for name in ("torch", "transformers")}
    found: dict[str, Any] = {}
    for way, lora in STEPS.items():
        for figures in plan(lora=lora):
            found[way] = figures
            PLANNED.write_text(json.dumps({"steps": found, "versions": versions}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
