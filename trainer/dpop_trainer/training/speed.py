"""How fast a run is and how much memory it takes, measured when it logs and at no other time."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """Wall time since the last lap, without what `paused` encloses (evaluation, checkpoints). It never syncs: a run
    logs after it has read its loss from the device, so everything up to there has been computed.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._since, self._pauses = time.perf_counter(), 0.0

    def lap(self) -> float:
        """Seconds of training since the last lap; counts from now on."""
        seconds = time.perf_counter() - self._since - self._pauses
        self.restart()
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within is not training. May be nested."""
        since, pauses = time.perf_counter(), self._pauses
        try:
            yield
        finally:
            self._pauses = pauses + time.perf_counter() - since


def peak_memory_gib(device: torch.device) -> float:
    """The most memory taken so far, in GiB: allocated on a GPU, resident of this process elsewhere (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux
