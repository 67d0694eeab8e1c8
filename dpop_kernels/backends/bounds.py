"""How large tiles may be, for each way to compute them. Needs no Triton, so that a plan for a GPU is made anywhere."""

from typing import NamedTuple

import torch

from dpop_kernels.kernels.launch import LAUNCH
from dpop_kernels.logps.head import PLAIN, LogitTransform


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
    """Elements of a group of rows, whose element-wise temporaries are made at a time; 0 where a kernel needs none."""
    widens: bool = False
    """Whether products of 16-bit inputs are made in fp32, as a CPU has to."""

    def gradient_columns(self, num_rows: int, vocab_size: int, itemsize: int) -> int:
        """Columns of a gradient tile of so many rows."""
        num_tiles = self.gradient_bytes // (max(1, num_rows) * itemsize * self.columns)
        return min(vocab_size, max(1, num_tiles) * self.columns)

    def forward_bytes(
        self,
        num_tokens: int,
        vocab_size: int,
        hidden_size: int,
        itemsize: int,
        *,
        with_gradient: bool,
        with_stats: bool = False,
        transform: LogitTransform = PLAIN,
    ) -> int:
        """What a head's forward holds beside its results; `with_gradient` as a frozen head's forms it.

        A tile of logits, its exponentials where products do not take fp32, the rows' products with W; on a CPU widened
        rows and columns of 16-bit factors, and temporaries of a group, both gone when the targets' rows of W come.
        """
        rows, columns = min(num_tokens, self.rows), min(vocab_size, self.columns)
        tile = rows * columns
        in_place = with_gradient and self._product_itemsize(itemsize) == _FP32
        exps = 0 if in_place or not with_gradient else tile * itemsize
        states = rows * hidden_size * _FP32
        is_widened = self.widens and itemsize < _FP32
        products = states if with_gradient else 0
        widened = columns * hidden_size * _FP32 if is_widened else 0
        # z; its distances to the maximum, unless they replace the tile; then those cut for a moment, or the slope
        z, terms = int(not transform.is_identity), int(not in_place)
        has_slope = with_gradient and transform.softcap is not None
        temporaries = max(_transform_groups(transform), z + terms + int(with_stats or has_slope))
        scratch = temporaries * self._group(rows, columns) * _FP32
        targets = states + (rows * hidden_size * itemsize if is_widened else 0) if with_gradient else 0
        rows_widened = states if is_widened else 0
        return tile * _FP32 + exps + products + rows_widened + max(widened + scratch, targets)

    def backward_bytes(
        self, num_tokens: int, vocab_size: int, hidden_size: int, itemsize: int, *, transform: LogitTransform = PLAIN
    ) -> int:
        """What a trainable head's backward holds beside the gradients that it returns."""
        rows = min(num_tokens, self.gradient_rows)
        product_itemsize = self._product_itemsize(itemsize)
        columns = self.gradient_columns(rows, vocab_size, product_itemsize)
        tile = min(num_tokens, self.rows) * min(vocab_size, self.columns) * _FP32
        in_place = product_itemsize == _FP32 and rows <= self.rows and columns <= self.columns
        gradient = 0 if in_place else rows * columns * product_itemsize
        sums = columns * hidden_size * _FP32 if itemsize < _FP32 and num_tokens > self.gradient_rows else 0
        widened = (rows + columns) * hidden_size * _FP32 if self.widens and itemsize < _FP32 else 0
        states = num_tokens * hidden_size * _FP32 if itemsize < _FP32 else 0  # fp32 ones are returned as they are
        # z, its gradient, the slope
        temporaries = max(
            _transform_groups(transform), int(not transform.is_identity) + 1 + int(transform.softcap is not None)
        )
        group = self._group(min(num_tokens, self.rows), min(vocab_size, self.columns))
        return states + tile + gradient + sums + widened + temporaries * group * _FP32

    def _group(self, rows: int, columns: int) -> int:
        """Elements of a group: whole rows, one at least."""
        return min(rows, max(1, self.scratch // max(1, columns))) * columns if self.scratch else 0

    def _product_itemsize(self, itemsize: int) -> int:
        return max(itemsize, _FP32) if self.widens else itemsize


def _transform_groups(transform: LogitTransform) -> int:
    """Temporaries while z is made: a softcap's argument beside its tanh, which it does not replace."""
    return 2 if transform.softcap is not None else int(not transform.is_identity)


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
