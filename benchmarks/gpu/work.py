"""What a job's process is given: device, time, and a way to write what it finds."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.gpu import runner

TROUBLE = ("skipped", "refused", "failed")
"""Why a record has no time: nothing was tried, the result was wrong, it did not run."""


class Work:
    """
    Args:
        folder: for records.
        part: whose they are.
        seconds: for all of it.
        rehearse: tiny sizes on a CPU.
        done: a folder with records of an earlier call; what they hold is not measured again.
    """

    def __init__(
        self, folder: Path, part: str, *, seconds: float, rehearse: bool = False, done: Path | None = None
    ) -> None:
        self.path = folder / runner.RECORDS
        self.part, self.rehearse = part, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        # a CPU has no 16-bit products worth rehearsing
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.deadline = time.monotonic() + seconds
        self.code = runner.COMPLETE
        self._earlier = [record for place in (done, folder) if place for record in records.read(place / runner.RECORDS)]
        self._environment = records.environment(self.device)
        if rehearse:
            self._environment["device"] += ", interpreted"  # never to be taken for a GPU's figure

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def found(self, item: str) -> dict[str, Any] | None:
        """The record of an item that was measured, or was wrong, or failed, now or in an earlier call."""
        matching = (r for r in self._earlier if (r["part"], r.get("item")) == (self.part, item))
        return next((r for r in matching if "begun" not in r and "skipped" not in r), None)

    def write(self, item: str, *, is_ours: bool = True, **fields: Any) -> dict[str, Any]:
        """One record, on the disk at once. Where a result of ours is wrong or failed, the job's exit code says so."""
        record = {"part": self.part, "item": item, **fields, **self._environment}
        records.append(self.path, record)
        self._earlier.append(record)
        if is_ours and ("refused" in fields or "failed" in fields):
            self.code = runner.WRONG
        return record

    def measure(
        self,
        item: str,
        function: Callable[[], dict[str, Any]],
        *,
        predicted: dict[str, Any],
        least: float = 0.0,
        is_ours: bool = True,
    ) -> dict[str, Any]:
        """An item's record: from an earlier call, or made now.

        Args:
            item: its name within the part.
            function: measures -> fields of the record. What it raises is recorded, and costs nothing else its figures.
            predicted: what arithmetic says, written before it is measured and again beside the measurement.
            least: seconds with which it is not begun.
            is_ours: whether its failing is ours.
        """
        if (known := self.found(item)) is not None:
            return known
        if self.left < least:
            self.code = self.code or runner.UNFINISHED
            return self.write(item, predicted=predicted, skipped=f"{self.left:.0f} s are left")
        self.write(item, predicted=predicted, begun=True)
        try:
            fields = function()
        except Exception as error:
            fields = {"failed": f"{type(error).__name__}: {error}"[:1000]}
        return self.write(item, is_ours=is_ours, predicted=predicted, **fields)
