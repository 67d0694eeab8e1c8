"""Our own frozen head in other tiles, and as one Triton product (gemm_head.py): what chooses the launch constants."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from benchmarks.cases import HeadCase
from benchmarks.gpu.head import CASES, compare
from benchmarks.gpu.work import Work
from benchmarks.peers import Peer
from benchmarks.shapes import HeadShape

TILES = ((1024, 8192), (2048, 8192), (1024, 4096), (2048, 4096), (4096, 8192), (512, 16384))
"""Rows and columns of a tile of logits; the first are `LAUNCH`'s own."""
REHEARSED_TILES = ((1024, 8192), (4, 4096))
REHEARSED_HEAD = HeadShape("tiny, two tiles wide", 8300, 32)


def run(work: Work, name: str) -> None:
    """Forward with backward, and forward alone, of every variant at the largest size."""
    head, num_tokens = (REHEARSED_HEAD, 6) if work.rehearse else CASES[-1]
    tiles = REHEARSED_TILES if work.rehearse else TILES
    ways = {f"tiles of {rows} x {columns}": in_tiles(rows, columns) for rows, columns in tiles} | {"gemm": as_product}
    peers = {
        way: Peer(
            way, "a variant of linear_token_logps", package="dpop-kernels", takes_softcap=False, linear_logps=function
        )
        for way, function in ways.items()
    }
    for task in ("frozen", "reference"):
        compare(
            work, HeadCase(task=task, head=head, num_tokens=num_tokens, device=work.device, dtype=work.dtype), peers
        )


def in_tiles(rows: int, columns: int) -> Callable[..., Tensor]:
    """The head's log-probs with this tile; a frozen head's backward walks over none."""
    from dpop_kernels.backends import bounds, fused_tiles
    from dpop_kernels.logps import tiling
    from dpop_kernels.logps.head import Head

    def logps(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: Any) -> Tensor:
        chosen = bounds.LAUNCH
        bounds.LAUNCH = fused_tiles.LAUNCH = replace(chosen, head_rows=rows, head_columns=columns)
        try:
            return tiling.tiled_token_logps(fused_tiles, hidden_states, Head(weight), target_ids)[0]
        finally:
            bounds.LAUNCH = fused_tiles.LAUNCH = chosen

    return logps


def as_product(hidden_states: Tensor, weight: Tensor, target_ids: Tensor, softcap: Any) -> Tensor:
    from benchmarks import gemm_head

    return gemm_head.gemm_token_logps(hidden_states, weight, target_ids)
