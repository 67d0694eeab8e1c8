"""One run at a time in a folder: a lock of the system's, which names who holds it and ends with that process.

Two runs in one folder would remove each other's checkpoints and mix their logs, and each would call the result its own.
"""

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from dpop_trainer.run_folder.checkpoints import CheckpointError
from dpop_trainer.run_folder.files import write_json

logger = logging.getLogger(__name__)

# with an underscore, so that transformers does not upload them with the model
_LOCK, _HOLDER = "_run.lock", "_run.holder"


@contextmanager
def held(output_dir: str | os.PathLike) -> Iterator[None]:
    """Hold a run's folder, which is made. Within a process it may be held by one who holds it already.

    Raises:
        CheckpointError: another process holds it: names it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    is_first = not lock.is_locked
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(_taken(folder)) from None
    except (OSError, NotImplementedError) as error:  # some network disks have no locks
        logger.warning("%s: cannot be locked (%s). See to it that no other run is started there.", folder, error)
        yield
        return
    try:
        if is_first:
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            write_json(folder / _HOLDER, {"process": os.getpid(), "host": platform.node(), "since": since})
        yield
    finally:
        if is_first:
            (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def check_not_running(output_dir: str | os.PathLike) -> None:
    """Before anything is loaded. Makes no folder and leaves nothing.

    Raises:
        CheckpointError: another process trains there.
    """
    folder = Path(output_dir)
    if not (folder / _HOLDER).exists():  # which a killed run leaves as well; the lock tells
        return
    try:
        with _lock(folder):
            pass
    except Timeout:
        raise CheckpointError(_taken(folder)) from None
    except (OSError, NotImplementedError):
        return


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.absolute() / _LOCK, timeout=0, is_singleton=True)


def _taken(folder: Path) -> str:
    try:
        holder = json.loads((folder / _HOLDER).read_text())
        told = f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        told = "another process"
    return (
        f"output_dir: expected a folder in which no run is going on, got {str(folder)!r}, where {told} trains. Wait "
        "for it, end it, or choose another output_dir."
    )
