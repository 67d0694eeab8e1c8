"""What a launch has to do, and how fast a GPU can: bytes at a copy's rate, FLOP at a product's, instructions at theirs.

A kernel can be no faster than the slowest of the three. Predictions stand for an H200 (`benchmarks/gpu/predicted.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from benchmarks.ahead.sass import Code, Part
from benchmarks.gpu import predicted
from dpop_kernels.kernels.launch import Launch

ROWS = 1024
"""Tokens that predictions are for: a tile's."""
PROCESSORS, SCHEDULERS, THREADS = 132, 4, 32
CLOCK = 989e12 / (PROCESSORS * 4096)
"""Per second: the data sheet's bf16 FLOP over what a multiprocessor of Hopper's multiplies in a clock."""
ISSUE = PROCESSORS * SCHEDULERS * CLOCK
"""Instructions of a warp per second, one per clock and scheduler."""


class Step(NamedTuple):
    """What one pass through a kernel's hot part covers."""

    block: str
    """The launch's constant that is its number of elements."""
    is_loop: bool
    """Whether the hot part is the kernel's loop; else it is what stands outside of any."""


STEPS = {
    "head_tile_fwd_kernel": Step("BLOCK_C", is_loop=False),  # its loop is seldom run: where a tile raises the maximum
    "head_rows_fwd_kernel": Step("BLOCK_H", is_loop=True),
    "head_rows_bwd_kernel": Step("BLOCK_H", is_loop=False),
    "log_softmax_gather_fwd_kernel": Step("BLOCK_V", is_loop=True),
    "log_softmax_gather_bwd_kernel": Step("BLOCK_V", is_loop=False),
    "segment_sum_kernel": Step("BLOCK_N", is_loop=True),
    "segment_broadcast_kernel": Step("BLOCK_N", is_loop=True),
    "pair_dpop_fwd_kernel": Step("BLOCK_N", is_loop=True),
}
FORWARD, BACKWARD = (("BLOCK_M", "BLOCK_N"),), (("BLOCK_M2", "BLOCK_N2"), ("BLOCK_M1", "BLOCK_N1"))
"""Queries and keys of a tile of FlexAttention's kernels: of their loops, two by two."""
BY_ROWS = {name for name, step in STEPS.items() if step.block != "BLOCK_N"}
"""Those whose work is a matrix. What sums segments moves kilobytes and waits for memory once or twice."""


def hot_part(launch: Launch, code: Code) -> Part | None:
    """What a launch spends its time in; None where it has only a few numbers per row to work on."""
    if not STEPS[launch.kernel.__name__].is_loop:
        return code.straight
    return max(code.loops, key=len, default=None)


def instructions_per_element(launch: Launch, hot: Part) -> float:
    """Of one thread, for each element that a step covers."""
    block = launch.arguments[STEPS[launch.kernel.__name__].block]
    return len(hot) * launch.num_warps * THREADS / block


def elements_and_bytes(launch: Launch) -> tuple[float, float] | None:
    """For `ROWS` rows: elements of the launch's largest matrix, bytes read and written; None without a matrix."""
    if launch.kernel.__name__ not in BY_ROWS:
        return None
    rows = {name: value[0] for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    # the accumulator is touched where a tile raises the maximum, which is seldom
    if launch.kernel.__name__ == "head_tile_fwd_kernel":
        rows.pop("products_ptr", None)
    widest = max(row.numel() for row in rows.values())
    return float(ROWS * widest), float(ROWS * sum(row.numel() * row.itemsize for row in rows.values()))


def predicted_seconds(elements: float, num_bytes: float, per_element: float) -> dict[str, float]:
    """By what bounds it."""
    return {"bytes": num_bytes / predicted.COPY, "instructions": per_element * elements / THREADS / ISSUE}


def attention_seconds(
    loops: Sequence[Part],
    *,
    direction: str,
    tiles: dict[str, int],
    num_warps: int,
    num_heads: int,
    head_size: int,
    scores: Sequence[int],
) -> dict[str, float]:
    """Flat attention of one layer by what bounds it: its products' FLOP, and the instructions of its loops.

    Args:
        loops: of the kernel: over blocks seen in part, over those seen whole; backward first for the queries' gradient,
            then for the keys' and values'.
        direction: forward or backward.
        tiles: the template's own sizes by its names of them.
        num_warps: of a program.
        num_heads: of the queries.
        head_size: D.
        scores: that a head computes in blocks seen in part, and in those seen whole.
    """
    # backward makes the scores and their gradient anew in either half
    num_products, halves = {"forward": (2, FORWARD), "backward": (7, BACKWARD)}[direction]
    flop = num_products * 2.0 * sum(scores) * num_heads * head_size
    seconds = {"products": flop / predicted.PRODUCTS}
    if len(loops) == 2 * len(halves):
        issued = 0.0
        for (rows, columns), *pair in zip(halves, loops[::2], loops[1::2], strict=True):
            # what looks into a block has more to do
            lengths = sorted(map(len, pair), reverse=True)
            passes = (count * num_heads / (tiles[rows] * tiles[columns]) for count in scores)
            issued += num_warps * sum(each * length for each, length in zip(passes, lengths, strict=True))
        seconds["instructions"] = issued / ISSUE
    return seconds
