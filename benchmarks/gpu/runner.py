"""Jobs one after the other, each in its own process, each ended in time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import records
from benchmarks.gpu.jobs import Job

ROOT = Path(__file__).parents[2]
RECORDS, LOG = "gpu.jsonl", "log.txt"
COMPLETE, WRONG, UNFINISHED = 0, 3, 4
"""Exit codes of a job: all is measured; all is, and a result of ours is wrong or failed; there was no time for all."""
LEAST = 8.0
"""Seconds with which no job is begun: its imports alone take as long."""
GRACE = 2.0
"""Seconds before a job's process is killed, at which it should have ended by itself."""


@dataclass
class Clock:
    """A call's time."""

    budget: float
    now: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.start


def run(
    jobs: Sequence[Job], folder: Path, clock: Clock, execute: Callable[[Job, float], int | None], done: set[str]
) -> bool:
    """Whether every job that was begun ended by itself, and nothing of ours was wrong.

    Each job has its place in the call: it is ended there at the latest, however early it began, so that what one leaves
    over is there for the next, and none costs a later one its time.

    Args:
        jobs: in this order.
        folder: for the records.
        clock: of this call.
        execute: runs a job for so many seconds -> its exit code, None where it was killed.
        done: jobs that are not done again.
    """
    end, fine = 0.0, True
    for job in jobs:
        if str(job) in done:
            continue
        end = min(end + job.cap, clock.budget)
        begun, given = clock.spent, end - clock.spent
        if given < LEAST:
            _record(folder, job, ended="no time", given_s=given)
            continue
        code = execute(job, given)
        took = clock.spent - begun
        ended = "cut" if code is None else {COMPLETE: "done", UNFINISHED: "unfinished"}.get(code, f"exit {code}")
        ended = "done, ours wrong" if code == WRONG else ended
        _record(folder, job, ended=ended, given_s=given, took_s=took)
        print(f"{clock.spent:4.0f} s  {job}: {ended} after {took:.0f} of {given:.0f} s", flush=True)
        fine &= code in (COMPLETE, UNFINISHED)
    return fine


def done_jobs(folder: Path) -> set[str]:
    """What a folder's records say is done."""
    return {record["job"] for record in records.read(folder / RECORDS) if record.get("ended", "").startswith("done")}


def process(folder: Path, options: Sequence[str]) -> Callable[[Job, float], int | None]:
    """What executes a job as `python -m benchmarks.gpu FOLDER --job NAME`, its output appended to the log.

    Args:
        folder: for records and log.
        options: more of the command.
    """

    def execute(job: Job, seconds: float) -> int | None:
        command = [sys.executable, "-m", "benchmarks.gpu", str(folder), "--job", str(job), *options]
        return ended([*command, "--seconds", f"{seconds - GRACE:.1f}"], folder / LOG, seconds)

    return execute


def ended(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Its exit code; None where it was killed, with all that it had started."""
    paths = [str(ROOT), str(ROOT / "trainer"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        # a process that holds the GPU nearly full cannot afford holes between blocks
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # when interrupted too; what a job leaves running would be measured with the next
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _record(folder: Path, job: Job, **fields: object) -> None:
    records.append(folder / RECORDS, {"part": job.part, "job": str(job), **fields})
