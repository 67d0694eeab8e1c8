"""Files that are whole or not there: written beside their place, then renamed into it."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a run that is killed meanwhile, finds the old content or the new; makes its
    folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically`, as indented JSON; what JSON has no form for is written as text."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def append_lines(path: Path, lines: str) -> None:
    """Add whole lines to a file, or none: a part of a line, which a kill or a full disk has left, is taken off first.

    Raises:
        OSError: they cannot be written.
    """
    content = lines.encode()
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            end = path.read_bytes().rfind(b"\n") + 1
            file.truncate(end)
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def check_writable(output_dir: str | os.PathLike) -> None:
    """Before anything is loaded. Makes no folder: a run that is refused later leaves none behind.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    folder = Path(output_dir)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(
            f"output_dir: expected a folder, got {str(output_dir)!r}, where {existing} is a file. Choose another."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir: expected a folder that can be written to, got {str(output_dir)!r}, where {existing} is "
            "read-only for you. Choose another, or change its permissions."
        )


def flush_folder(folder: Path) -> None:
    """Have the system write a folder's files to the disk, so that they outlive a power cut too."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """The same for one file, or for a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def filled_at_once(folder: Path, *, last: str) -> Iterator[Path]:
    """A place to write files to, which move into `folder` when all went well: so that none is there before all are.

    Args:
        folder: made if it is not there. What a killed process has left half written in it is removed.
        last: the file that moves last, by which others know that the folder is taken.
    """
    part, is_new = folder / ".incomplete", not folder.exists()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        flush_folder(part)
        for path in sorted(part.iterdir(), key=lambda path: path.name == last):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
        flush(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # where nothing has come into it


def move_folder(source: Path, target: Path, aside: Path) -> None:
    """Put a folder into its place by one rename. One that stands there goes to `aside` first and is then removed."""
    if target.exists():
        os.replace(target, aside)
    os.replace(source, target)
    flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
