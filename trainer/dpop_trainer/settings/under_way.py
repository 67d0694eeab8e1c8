"""A line that says what is under way while there is nothing else to see: on a terminal, gone when it is done."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpop_trainer.settings.terminal import printable

LIBRARIES = "Loading torch and transformers"


@contextmanager
def under_way(what: str) -> Iterator[Callable[[str], None]]:
    """Show `what` until the end, or until the function that is handed out is told what comes next."""
    is_shown = sys.stderr.isatty()

    def show(text: str) -> None:
        if is_shown:
            print(f"\r\033[K{printable(text)} ...", end="", file=sys.stderr, flush=True)

    show(what)
    try:
        yield show
    finally:
        if is_shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
