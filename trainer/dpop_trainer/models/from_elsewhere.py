"""Models and tokenizers that others have saved: whatever their readers raise is one sentence that names them."""

from collections.abc import Iterator
from contextlib import contextmanager

from dpop_trainer.data.partial_files import is_full_disk


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
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if is_full_disk(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{expected}, got {name!r}. {kind}{error}") from error
