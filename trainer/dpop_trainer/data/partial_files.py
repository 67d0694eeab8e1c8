"""Files that are whole or not there, written by processes that may be killed: to a name of their own, then renamed."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL = re.compile(r"\.\d+\.partial")
_STALE_SECONDS = 86400


def partial_of(path: Path) -> Path:
    """Where this process writes what is to be `path`; makes its folder, and removes what killed ones have left there:
    what nobody has written to for a day."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob("*.partial"):
        with suppress(OSError):  # another process does the same
            if _PARTIAL.search(other.name) and time.time() - other.stat().st_mtime > _STALE_SECONDS:
                other.unlink()
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all went well.

    Another process may write the same file at the same time: each reader sees a whole one.
    """
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
