"""Warnings are errors in the tests, but not every library's use of another library's old name.

A function that is deprecated warns of its caller. Where that caller is a library's code, no one here can mend it: such
a warning is dropped. Where it is this project's code or a test, the warning stays and fails the test.
"""

import sys
import sysconfig
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_warn = warnings.warn


def drop_deprecations_between_libraries() -> None:
    """From here on, in this process."""
    warnings.warn = _warn_of_our_own


def make_warnings_errors() -> None:
    """In a process that pytest did not start: what pyproject.toml tells pytest."""
    warnings.simplefilter("error")
    message = "Conversion of an array with ndim > 0 to a scalar is deprecated"
    warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)


def _warn_of_our_own(message, category=None, stacklevel=1, source=None, **kwargs):
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, DEPRECATIONS) and not _is_ours(_caller(sys._getframe(1))):
        return
    _warn(message, category, stacklevel + 1, source, **kwargs)


def _caller(warns: FrameType) -> FrameType:
    """The nearest frame outside of the file that warns (a wrapper of Python's own does not count)."""
    frame = warns
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_code.co_filename
        is_standard = name.startswith(("<", _STANDARD_LIBRARY)) and "site-packages" not in name
        if name != warns.f_code.co_filename and not is_standard:
            break
    return frame


def _is_ours(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return ROOT in path.parents and "site-packages" not in path.parts
