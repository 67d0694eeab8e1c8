"""What the console command may do in a process of its own: leave out of its imports what this command never needs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_own_process() -> bool:
    """Whether this process is the console command's, which nobody asks for anything else afterwards."""
    program = Path(sys.argv[0])
    return program.stem == "dpop" or program.parent.name == "dpop_trainer"


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Inside, packages that are not imported yet cannot be found.

    What a library finds missing at its import stays missing for the whole process.
    """
    absent = [package for package in packages if package not in sys.modules]
    sys.modules |= dict.fromkeys(absent)  # type: ignore[arg-type]  # None says that it cannot be imported
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]
