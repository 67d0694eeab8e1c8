"""What one record, one packed file and one template may take: bounds on input that would not end or fill the memory.

Each is a variable of the environment, which every command and script and their worker processes meet alike: how much
is too much is a matter of the machine, and of no run. What meets a bound is told with the bound's name.
"""

import os
from typing import NamedTuple

_MOST = 1e6  # so that every one is a number of bytes or a time that the system has


class Limit(NamedTuple):
    """Called, it gives its value."""

    name: str
    default: float
    unit: str

    def __call__(self) -> float:
        """
        Raises:
            ValueError: the environment has no number for it.
        """
        text = os.environ.get(self.name) or str(self.default)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= _MOST:
            raise ValueError(
                f"{self.name}: expected a number above 0 and up to {_MOST:g} ({self.unit}), got {text!r} in the "
                f"environment. Set another, or unset it for {self.default:g}."
            )
        return value

    def told(self) -> str:
        """For messages: "16 MiB (DPOP_MAX_RECORD)"."""
        return f"{self():g} {self.unit} ({self.name})"


# a record is held whole, and tokenised whole
RECORD = Limit("DPOP_MAX_RECORD", 16, "MiB")
# text that people write is packed to a tenth; gzip's most is a thousandth
UNPACKED = Limit("DPOP_MAX_UNPACKED", 200, "times its size")
TEMPLATE_SECONDS = Limit("DPOP_TEMPLATE_SECONDS", 20, "seconds")
# besides what the process has
TEMPLATE_MEMORY = Limit("DPOP_TEMPLATE_MEMORY", 4, "GiB")
LIMITS = (RECORD, UNPACKED, TEMPLATE_SECONDS, TEMPLATE_MEMORY)


def check_limits() -> None:
    """
    Raises:
        ValueError: one of them is no number; names it.
    """
    for limit in LIMITS:
        limit()


def longest_record() -> int:
    """Bytes of a record in a file, and characters of one as JSON."""
    return int(RECORD() * 2**20)


def longest_text() -> int:
    """Characters that a template may make of one record."""
    return 4 * longest_record()
