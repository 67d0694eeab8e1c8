"""What arithmetic says before anything is timed: FLOP and bytes over the rates that an H200 has been seen to reach."""

import json
from functools import cache

from benchmarks import records

COPY = 4.3e12
"""Bytes per second, read and written together, of a device's copy."""
PRODUCTS = 790e12
"""FLOP per second of an 8192³ product in bf16 on random data."""


def seconds(*, flop: float, num_bytes: float = 0.0) -> float:
    """No implementation that does this much arithmetic and moves this much memory is faster at these rates."""
    return max(flop / PRODUCTS, num_bytes / COPY)


@cache
def head_products() -> dict[str, dict[str, float]]:
    """By peer and task, the matrix products of its head, where they have been counted."""
    path = records.RESULTS / "head_products.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return {peer: dict(zip(found["tasks"], counts["products"], strict=True)) for peer, counts in found["peers"].items()}
