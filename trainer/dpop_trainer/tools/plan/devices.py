"""What devices can do, from their makers' data sheets; of this CPU, as measured here and now."""

import os
import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

GIB = 1 << 30

Sharding = Literal["none", "ddp", "fsdp2", "zero2", "zero3"]
SHARDINGS: tuple[Sharding, ...] = ("none", "ddp", "fsdp2", "zero2", "zero3")
"""How several devices share a model."""

ASSUMED_GPU_UTILISATION = 0.4
"""Of the peak, in matrix products over a whole step: an assumption, until a record of ours replaces it."""
CPU_UTILISATION, CPU_UTILISATION_16_BIT = 0.66, 0.43
"""Of the rate of a model's own products, this part is what a CPU's step reaches: benchmarks/results/planned_cpu.json.
In bf16 and fp16 products take half of the time or less, and what is between them as long as ever."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU with its memory."""

    name: str
    memory_gib: float
    tflops: float
    """Dense matrix products in bf16 with fp32 sums, at their peak; on a CPU those of a model's own shapes and dtype."""
    bandwidth_gb: float
    """Of its memory, 1e9 bytes per second."""
    utilisation: float
    """Part of `tflops` that a step reaches."""
    origin: str
    """Where the figures are from."""
    is_gpu: bool = True
    head_tflops: float | None = None
    """Of the head's products, where they have another rate: a CPU makes them in fp32, whatever the others are."""

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB


_SHEETS = {
    # memory as the driver reports it, in GiB; dense bf16 TFLOP/s; GB/s
    "a100-40gb": (39.5, 312.0, 1555.0, "NVIDIA A100 SXM 40 GB"),
    "a100-80gb": (79.3, 312.0, 2039.0, "NVIDIA A100 SXM 80 GB"),
    "h100-80gb": (79.1, 989.0, 3350.0, "NVIDIA H100 SXM"),
    "h100-pcie": (79.1, 756.0, 2000.0, "NVIDIA H100 PCIe"),
    "h200-141gb": (139.8, 989.0, 4800.0, "NVIDIA H200 SXM"),
    "b200-180gb": (178.0, 2250.0, 7700.0, "NVIDIA B200 (HGX)"),
    "l4-24gb": (22.0, 121.0, 300.0, "NVIDIA L4"),
    "l40s-48gb": (44.4, 362.0, 864.0, "NVIDIA L40S"),
    "rtx3090-24gb": (23.6, 71.0, 936.0, "NVIDIA GeForce RTX 3090"),
    "rtx4090-24gb": (23.5, 165.2, 1008.0, "NVIDIA GeForce RTX 4090"),
    "mi300x-192gb": (191.5, 1307.0, 5300.0, "AMD Instinct MI300X"),
}

DEVICE_NAMES = (*_SHEETS, "cpu")


def find_device(
    name: str | None,
    *,
    memory: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    utilisation: float | None = None,
) -> Device:
    """A device by name, with any of its figures replaced; or one described by its figures alone.

    Args:
        name: of `DEVICE_NAMES`, or anything where memory and tflops are given; "h100" will do where one name begins so.
        memory: GiB.
        tflops: peak of dense bf16 products.
        bandwidth: GB/s.
        utilisation: part of the peak that a step reaches.

    Raises:
        ValueError: no such device, or a figure out of range.
    """
    for flag, value in (("memory", memory), ("tflops", tflops), ("bandwidth", bandwidth), ("mfu", utilisation)):
        if value is not None and not value > 0:
            raise ValueError(f"{flag}: expected a number > 0, got {value}.")
    if utilisation is not None and utilisation > 1:
        raise ValueError(f"mfu: expected a part of the peak, in (0, 1], got {utilisation}. 40 percent is 0.4.")
    begun = [known for known in _SHEETS if name is not None and known.startswith(name.lower())]
    if name == "cpu":
        gib, rate, speed = _this_cpu()
        origin, share, is_gpu = "measured here", CPU_UTILISATION, False
    elif begun:
        gib, rate, speed, sheet = _SHEETS[name.lower() if name and name.lower() in _SHEETS else begun[0]]
        origin, share, is_gpu = f"data sheet, {sheet}", ASSUMED_GPU_UTILISATION, True
        name = name.lower() if name and name.lower() in _SHEETS else begun[0]
    elif memory is not None and tflops is not None:
        gib, rate, speed = memory, tflops, tflops * 3.0  # bytes per FLOP of an H100
        name, origin, share, is_gpu = name or "own device", "as given", ASSUMED_GPU_UTILISATION, True
    else:
        raise ValueError(
            f"device: expected one of {', '.join(DEVICE_NAMES)}, got {name!r}. Give --memory (GiB) and --tflops for "
            "any other."
        )
    assert name is not None
    given = memory is not None or tflops is not None or bandwidth is not None
    return Device(
        name,
        memory if memory is not None else gib,
        tflops if tflops is not None else rate,
        bandwidth if bandwidth is not None else speed,
        utilisation if utilisation is not None else share,
        f"{origin}, changed as given" if given and origin != "as given" else origin,
        is_gpu,
    )


PRODUCT_ROWS = 1024
"""Of the products that a CPU is measured with: positions of a batch of a few pairs."""


def with_products(device: Device, width: int, inner_width: int, dtype: Any, utilisation: float | None) -> Device:
    """This CPU at the rate of a model's own products, which for small ones is half of that of large ones, and in bf16
    twice or a hundredth of fp32's, as the processor has it.

    Args:
        device: the CPU.
        width: hidden size.
        inner_width: of the MLP.
        dtype: in which products are computed.
        utilisation: part of their rate that a step reaches; None: what it reached in our records.
    """
    import torch

    rate, wide_rate = (_product_rate(width, inner_width, kind) / 1e12 for kind in (dtype, torch.float32))
    share = CPU_UTILISATION if dtype.itemsize > 2 else CPU_UTILISATION_16_BIT
    share = share if utilisation is None else utilisation
    return replace(device, tflops=rate, head_tflops=wide_rate, utilisation=share)


@cache
def _product_rate(width: int, inner_width: int, dtype: Any) -> float:
    """FLOP per second of an MLP's two products, a fraction of a second."""
    import torch

    rows = torch.randn(PRODUCT_ROWS, width).to(dtype)
    up, down = (torch.randn(shape).to(dtype) for shape in ((inner_width, width), (width, inner_width)))
    seconds = _median_seconds(lambda: torch.nn.functional.linear(torch.nn.functional.linear(rows, up), down))
    return 4 * PRODUCT_ROWS * width * inner_width / seconds


@cache
def _this_cpu() -> tuple[float, float, float]:
    """-> GiB, TFLOP/s of an fp32 product, GB/s of a copy; a quarter of a second."""
    import torch

    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    left, right = torch.randn(1024, 512), torch.randn(512, 4096)
    out = torch.zeros(1024, 4096)
    source, target = torch.ones(8 << 20), torch.zeros(8 << 20)
    product = _median_seconds(lambda: torch.mm(left, right, out=out))
    copy = _median_seconds(lambda: target.copy_(source))
    return gib, 2 * 1024 * 512 * 4096 / product / 1e12, 2 * source.nbytes / copy / 1e9


def _median_seconds(run) -> float:
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
