"""Errors that the command line tells apart, and what was being done when a library's came."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_DOING, _FOLDER = "_dpop_doing", "_dpop_folder"


class UsageError(ValueError):
    """The command line itself is wrong, whatever its values: exit code 2."""


@contextmanager
def doing(what: str, folder: str | os.PathLike | None = None) -> Iterator[None]:
    """For an error that comes from within and does not say where: what was being done, of several the innermost.

    Args:
        what: with the file or argument, as in "loading the model 'x'".
        folder: that was written to.
    """
    try:
        yield
    except Exception as error:
        for name, value in ((_DOING, what), (_FOLDER, folder)):
            if value is not None and getattr(error, name, None) is None:
                setattr(error, name, value)
        raise


def what_was_done(error: Exception) -> str | None:
    """See `doing`."""
    return getattr(error, _DOING, None)


def folder_written_to(error: Exception) -> str | None:
    """See `doing`."""
    return getattr(error, _FOLDER, None)
