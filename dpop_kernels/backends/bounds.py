"""How large tiles may be, for each way to compute them. Needs no Triton, so that a plan for a GPU is made anywhere."""

from typing import NamedTuple

import torch

from dpop_kernels.kernels.launch import LAUNCH


class TileBounds(NamedTuple):
    """Bounds of the workspace."""

    rows: int
    """Rows of a tile of raw logits; all of the vocabulary is done for so many before the next."""
    columns: int
    """Its columns, and the rows of W that are converted at a time where products cannot take W's dtype."""
    gradient_rows: int
    """Rows of a trainable head's gradient tile: up to here W's gradient is one product, rounded once."""
    gradient_bytes: int
    """Its size, in whole tiles of logits and at least one."""
    pair_bytes: int
    """Logits of whole pairs that are in memory together, with a trainable head in three products."""
    scratch: int = 0
    """Elements of the rows whose element-wise temporaries are made at a time; 0 where a kernel needs none."""
    widens: bool = False
    """Whether products of 16-bit inputs are made in fp32, as a CPU has to."""

    def gradient_columns(self, num_rows: int, vocab_size: int, itemsize: int) -> int:
        """Columns of a gradient tile of so many rows."""
        num_tiles = self.gradient_bytes // (max(1, num_rows) * itemsize * self.columns)
        return min(vocab_size, max(1, num_tiles) * self.columns)

    def forward_bytes(
        self, num_tokens: int, vocab_size: int, hidden_size: int, itemsize: int, *, with_gradient: bool
    ) -> int:
        """What a head's forward holds beside its results; `with_gradient` as a frozen head's forms it.

        A tile of logits, its exponentials where products do not take fp32, the rows' products with W; on a CPU widened
        rows and columns of 16-bit factors, and temporaries of a group.
        """
        rows, columns = min(num_tokens, self.rows), min(vocab_size, self.columns)
        tile = rows * columns
        in_place = with_gradient and self._product_itemsize(itemsize) == _FP32
        exps = 0 if in_place or not with_gradient else tile * itemsize
        products = 2 * rows * hidden_size * _FP32 if with_gradient else 0  # and the targets' rows of W
        widened = (rows + columns) * hidden_size * _FP32 if self.widens and itemsize < _FP32 else 0
        scratch = 0 if in_place else min(self.scratch, tile) * _FP32
        return tile * _FP32 + exps + products + widened + scratch

    def backward_bytes(self, num_tokens: int, vocab_size: int, hidden_size: int, itemsize: int) -> int:
        """What a trainable head's backward holds beside the gradients that it returns."""
        rows = min(num_tokens, self.gradient_rows)
        product_itemsize = self._product_itemsize(itemsize)
        columns = self.gradient_columns(rows, vocab_size, product_itemsize)
        tile = min(num_tokens, self.rows) * min(vocab_size, self.columns) * _FP32
        in_place = product_itemsize == _FP32 and rows <= self.rows and columns <= self.columns
        gradient = 0 if in_place else rows * columns * product_itemsize
        sums = columns * hidden_size * _FP32 if itemsize < _FP32 and num_tokens > self.gradient_rows else 0
        widened = (rows + columns) * hidden_size * _FP32 if self.widens and itemsize < _FP32 else 0
        states = num_tokens * hidden_size * _FP32
        return states + tile + gradient + sums + widened + 2 * min(self.scratch, rows * columns) * _FP32

    def _product_itemsize(self, itemsize: int) -> int:
        return max(itemsize, _FP32) if self.widens else itemsize


_FP32 = 4
# 1 MiB of fp32: half of a server core's L2, so a group and one temporary stay there.
GROUP_ELEMENTS = 1 << 18


# 8 MiB of fp32: products stay compute-bound, and a tile is still in a server's cache when its exponentials are made.
CPU = TileBounds(
    rows=512,
    columns=4096,
    gradient_rows=512,
    gradient_bytes=8 << 20,
    pair_bytes=64 << 20,
    scratch=GROUP_ELEMENTS,
    widens=True,
)


def triton_bounds() -> TileBounds:
    """Those of the Triton kernels; `LaunchConstants` tells why. Torch's own operations on a GPU take the same."""
    return TileBounds(
        LAUNCH.head_rows, LAUNCH.head_columns, LAUNCH.grad_rows, LAUNCH.grad_tile_bytes, LAUNCH.pair_tile_bytes
    )


def torch_bounds(device: torch.device) -> TileBounds:
    """Those of torch's operations on a device."""
    return triton_bounds()._replace(scratch=GROUP_ELEMENTS) if device.type == "cuda" else CPU
