"""How the kernels are launched: the constants, and a launch as a value that can be run or compiled ahead of time."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LaunchConstants:
    """Block sizes and warps. Chosen by the arithmetic given under each; no GPU has been timed."""

    block_v: int = 4096
    """Logits per step of a row. With `vocab_warps` each of 256 threads holds 16 of them, which are two 16-byte loads in
    bf16 and four in fp32: enough in flight to cover HBM's latency, at so few registers that several rows share one
    multiprocessor and one row's reduction hides behind another's loads. A vocabulary of 128k takes 32 steps."""
    vocab_warps: int = 8
    """256 threads (512 on AMD): fewer would hold more registers each, more would lengthen the row reduction's tail."""
    block_n: int = 1024
    """Tokens per step of a segment: most answers take one or two steps. All kernels that sum a segment share it, so
    that they round alike and policy minus reference is exactly zero where the two models agree."""
    segment_warps: int = 4
    """128 threads of 8 tokens: a segment is a few kilobytes, so latency counts here and not bandwidth."""
    head_rows: int = 1024
    """Rows of a tile of the head's logits. Against 8192 columns an fp32 tile is 32 MiB, which an H100's 50 MB of L2
    hold between the product that makes it and the kernel that reads it, and its 256 output blocks of 128 x 256 are
    1.94 rounds on 132 multiprocessors. W is read once per product and 1024 rows: 1024 FLOP per byte of it in bf16,
    where the machine's balance is about 250."""
    head_columns: int = 8192
    """Columns of that tile: one row is 32 floats for each of `head_warps`' 256 threads. The [1024, H] accumulator of
    E W is read and written once per tile: with K = 8192 that is 2 * 8192 / 8 = 2048 FLOP per byte."""
    head_warps: int = 8
    """A row stays in registers between its maximum and its exponentials; fewer warps would spill."""
    block_h: int = 1024
    """Hidden dimensions per step: 16 bytes of fp32 for each of 256 threads."""
    grad_rows: int = 16384
    """Rows of a trainable head's gradient tile. Their sum into W's gradient is one product, so up to here W's gradient
    is rounded once and needs no accumulator."""
    grad_tile_bytes: int = 256 << 20
    """Its size: 8192 columns of 16384 rows in bf16, 32768 of 4096. The wider it is, the less often grad_hidden's
    accumulator travels. With the [1024, 8192] tile this stays under 512 MiB."""
    pair_tile_bytes: int = 256 << 20
    """Logits of whole pairs that are kept with a trainable head in three products, where W itself is smaller."""


LAUNCH = LaunchConstants()


class Launch(NamedTuple):
    """One kernel with everything it is launched with."""

    kernel: Any
    """The function under `triton.jit`."""
    num_programs: int
    """Size of the one-dimensional grid, whose limit is 2**31 - 1 (65535 in the other dimensions)."""
    arguments: dict[str, Any]
    """Every parameter of the kernel by name; None for a pointer that its flags leave unused."""
    num_warps: int
    num_stages: int = 3
    """Loads in flight of a kernel with a matrix product; the others have nothing to pipeline."""

    def run(self) -> None:
        """Launch on the device of the tensors, whichever device is current; an empty grid launches nothing."""
        if self.num_programs == 0:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.num_programs,)](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data, for launches that are only compiled."""
    return torch.empty(shape, dtype=dtype, device="meta")
