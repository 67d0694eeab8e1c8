"""Models and tokenizers that others have saved: whatever their readers raise is one sentence that names them."""

from collections.abc import Iterator
from contextlib import contextmanager

from dpop_trainer.data.no_room import pass_no_room


@contextmanager
def from_elsewhere(expected: str, name: str) -> Iterator[None]:
    """Around a library's call that reads files of others, and may fail in any way.

    Args:
        expected: the argument and what it should be, as in "model: expected a folder with a model".
        name: what was given.

    Raises:
        ValueError: it cannot be read. What is wrong here, and not with the files, passes: a package that is missing, no
            memory, no room on the disk.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        pass_no_room(error)
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{expected}, got {name!r}. {kind}{error}") from error
