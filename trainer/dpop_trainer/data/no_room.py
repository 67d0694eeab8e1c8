"""Errors that say nothing about what is read or written: there was no room for it."""

import errno


def is_full_disk(error: BaseException) -> bool:
    """Whether there was no room to write."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was none left, of the machine or of a device: torch's own error is known by its name."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def pass_no_room(error: Exception) -> None:
    """
    Raises:
        Exception: the error, or what caused it, where it says that a disk or memory is full.
    """
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if is_full_disk(cause) or is_out_of_memory(cause):
        raise cause
