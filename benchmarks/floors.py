"""What this device does in this run: bandwidth of a copy, rate of a matrix product. The floor is made of the two."""

import functools
import statistics
from dataclasses import dataclass

import torch

from benchmarks.measure import time_in_turns


@dataclass(frozen=True)
class Floors:
    """Rates of the device in one dtype."""

    bytes_per_s: float
    """Read and written, together."""
    flop_per_s: float

    def seconds(self, *, flop: float, num_bytes: float) -> float:
        """No implementation that does this much arithmetic and moves this much memory is faster."""
        return max(flop / self.flop_per_s, num_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Probe:
    """Sizes of the two measurements."""

    copy_bytes: int
    gemm: tuple[int, int, int]
    """M, K, N."""


PROBES = {"cpu": Probe(256 << 20, (2048, 512, 8192)), "cuda": Probe(2 << 30, (8192, 4096, 16384))}
TINY = Probe(1 << 16, (64, 32, 64))


@functools.cache
def measure_floors(device: torch.device, dtype: torch.dtype, probe: Probe) -> Floors:
    """Medians of a copy and of a product into memory that is there already; measured once in a process."""
    source = torch.ones(probe.copy_bytes // 4, device=device)
    target = torch.zeros_like(source)
    m, k, n = probe.gemm
    left, right = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    out = torch.zeros(m, n, device=device, dtype=dtype)
    functions = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(left, right.T, out=out)}
    times = time_in_turns(functions, device, rounds=7, seconds=0.3)
    return Floors(
        bytes_per_s=2 * probe.copy_bytes / statistics.median(times["copy"]),
        flop_per_s=2 * m * k * n / statistics.median(times["gemm"]),
    )
