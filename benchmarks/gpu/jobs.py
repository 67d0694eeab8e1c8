"""What is measured, the most telling first, and how long it may take."""

import importlib
from typing import Any, NamedTuple


class Job(NamedTuple):
    """What has a process of its own: a library that hangs or runs out of memory costs the others nothing."""

    part: str
    """The module beside this one whose `run` does it."""
    name: str
    cap: float
    """Seconds."""

    def __str__(self) -> str:
        return f"{self.part}/{self.name}"

    @property
    def run(self) -> Any:
        return importlib.import_module(f"benchmarks.gpu.{self.part}").run


FIRST = (
    Job("correct", "tests", 40),
    Job("correct", "attention", 20),
    Job("head", "ready", 95),
    Job("head", "compiling", 35),
    Job("step", "Llama-3.2-1B/flat", 55),
    Job("step", "Llama-3.2-1B/trl", 45),
    Job("step", "Llama-3-8B/flat", 55),
    Job("step", "Llama-3-8B/trl", 45),
    Job("large", "Qwen-72B/flat", 55),
    Job("large", "Qwen-72B/trl", 50),
    Job("large", "Qwen-72B/rows", 45),
)
SECOND = (
    Job("longest", "Llama-3-8B", 70),
    Job("longest", "Gemma-3-1B", 50),
    Job("kernels", "each", 30),
    Job("tiles", "frozen", 50),
    Job("sweep", "levels", 40),
)
JOBS = FIRST + SECOND
FIRST_SECONDS, SECOND_SECONDS = 540.0, 240.0
"""A call's time. What the first leaves over goes to the jobs of the second, and the second begins with what the first
did not finish."""


def find(name: str) -> Job:
    """
    Raises:
        ValueError: there is none of this name.
    """
    for job in JOBS:
        if str(job) == name:
            return job
    raise ValueError(f"job: expected one of {', '.join(map(str, JOBS))}, got {name!r}.")
