"""A backend for tensors without data: the tiles of the Triton kernels, which work in place and allocate nothing.

It stands in for `dpop_kernels.backends.fused` where a step is counted: its tiles have the same bounds, so products,
workspace and results are those of a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from dpop_kernels.backends.bounds import TileBounds, triton_bounds
from dpop_kernels.backends.chunked import segment_sums

__all__ = ["RUNS_TRITON", "TILES", "segment_sums"]

RUNS_TRITON = False


class _Tiles:
    def tile_bounds(self, device: torch.device) -> TileBounds:
        return triton_bounds()

    def tile_forward(self, tile: Tensor, *arguments: Any, **options: Any) -> None:
        pass

    def rows_forward(self, *arguments: Any, **options: Any) -> None:
        pass

    def rows_backward(self, *arguments: Any, **options: Any) -> None:
        pass

    def tile_backward(self, tile: Tensor, *values: Any, out: Tensor, **options: Any) -> Tensor:
        return out


TILES = _Tiles()
