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

    def run(self) -> None:
        """Launch on the device of the tensors, whichever device is current; an empty grid launches nothing."""
        if self.num_programs == 0:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.num_programs,)](**self.arguments, num_warps=self.num_warps)
