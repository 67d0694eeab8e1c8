"""Time and memory of functions, side by side: in turns, synchronised, with a warm-up.

Time is wall-clock on a CPU and between two events on the stream on a GPU. Memory is what torch's allocator handed out
at the worst moment, over what it had handed out before: the same quantity on both devices, and the same in every run.
Scratch memory that a library takes past torch's allocator (MKL, cuBLAS) is in neither.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UPS = 1
MOST_ROUNDS = 200


def peak_resident_bytes() -> int:
    """The most memory that this process has held since it was started.

    Not `ru_maxrss` where there is another: Linux hands a process the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every function in every round: each runs once per round, so that a slow moment falls on all.

    Args:
        functions: by name; each is called `WARM_UPS` times first.
        device: where they run.
        rounds: at least this many.
        seconds: more rounds are begun until this much time has passed, `MOST_ROUNDS` at most.
    """
    for function in functions.values():
        for _ in range(WARM_UPS):
            _timed(function, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.monotonic()
    done = 0
    while functions and (done < rounds or (time.monotonic() - start < seconds and done < MOST_ROUNDS)):
        for name, function in functions.items():
            times[name].append(_timed(function, device))
        done += 1
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the number of rounds."""
    if len(seconds) == 1:
        return {"median_s": seconds[0], "p20_s": seconds[0], "p80_s": seconds[0], "rounds": 1}
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median_s": statistics.median(seconds), "p20_s": p20, "p80_s": p80, "rounds": len(seconds)}


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most memory that torch's allocator gave the function at once, over what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()  # type: ignore[attr-defined]  # torch's stubs leave it out
        peak = max(peak, held)
    return peak


def _timed(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
