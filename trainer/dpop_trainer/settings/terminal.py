"""What reaches the terminal: names, texts and replies of others are shown and steer nothing."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# of the control characters C0 and C1 all but a line's end and a tab, DEL, what turns the direction of writing, and
# halves of surrogate pairs, for which no encoding has bytes
_STEERING = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_SPELT_OUT = {code: f"\\x{code:02x}" for code in _STEERING if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A text for a terminal: what would move its cursor, colour it or set its title is spelt out; lines, tabs stay."""
    return text.translate(_SPELT_OUT)


def say(text: object, *, is_problem: bool = False, painted: Callable[[str], str] = str) -> None:
    """Print what may hold foreign text. Nothing in this package prints otherwise.

    Args:
        text: what to print.
        is_problem: on stderr.
        painted: puts our own colours into what is printable by then.
    """
    print(painted(printable(str(text))), file=sys.stderr if is_problem else sys.stdout, flush=True)


@contextmanager
def spelt_out() -> Iterator[None]:
    """Inside, whatever anyone logs or warns of is `printable`."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    class Record(logging.LogRecord):
        def getMessage(self) -> str:
            return printable(super().getMessage())

    logging.setLogRecordFactory(Record)
    warnings.formatwarning = lambda *args, **options: printable(format_warning(*args, **options))  # type: ignore
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning
