"""Paths that can be seen to be wrong without reading anything."""

import os
from pathlib import Path, PureWindowsPath
from typing import Any

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""The ending of a file of pairs -> what reads it."""


def expanded(name: str | os.PathLike) -> Path:
    """The path that a name means, with ~ as its user's home; as it stands, where nobody knows that home."""
    return Path(os.path.expanduser(name))


def is_json(path: Path) -> bool:
    """Whether the file's name says that it holds JSON: .jsonl or .json, compressed by gzip or not."""
    return json_suffix(path) in (".jsonl", ".json")


def json_suffix(path: Path) -> str:
    """The ending of a file's name, under that of gzip where there is one."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def json_file(source: Any) -> Path | None:
    """The path, where the source is an existing JSON file."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = expanded(source)
    return path if is_json(path) and path.is_file() else None


def loader_of(path: Path) -> str | None:
    """What reads a file of this name, of `LOADERS`; None where nothing does."""
    return "json" if is_json(path) else LOADERS.get(path.suffix)


def looks_local(name: str) -> bool:
    """Whether a name can only be that of a local file or folder, and no hub's id; the disk is not asked."""
    return (
        loader_of(Path(name)) is not None
        or Path(name).is_absolute()
        or PureWindowsPath(name).is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
    )


def check_source_path(source: str, split: str = "train") -> None:
    """
    Args:
        source: a file, a folder, or the id of a data set on the hub, which is not asked.
        split: what is to be taken of it.

    Raises:
        FileNotFoundError: the name is that of a file or folder, and there is none.
        ValueError: the file is of a kind that is not read, or a slice of it is asked for; or a home or a disk is named.
    """
    path = expanded(source)
    if path.is_dir():
        if path.resolve() in (expanded("~").resolve(), Path("/")):  # whose files would be looked through for minutes
            raise ValueError(
                f"source: expected a folder of data files, got {source}: a home or a disk. Name one in it."
            )
        return
    if path.is_file():
        if loader_of(path) is None:
            raise ValueError(
                f"source: expected a file ending in {', '.join(LOADERS)} (JSON also with .gz), got {source}. "
                "Convert it: one JSON object per line; docs/data.md lists the fields of pairs."
            )
        check_plain_split(split)
    elif looks_local(source):
        raise FileNotFoundError(
            f"source: expected an existing file or folder, got {source}. "
            f"Check the path; a relative one begins at {Path.cwd()}."
        )


def check_plain_split(split: str) -> None:
    """
    Raises:
        ValueError: a slice or a sum of splits is asked of a file, which has one split.
    """
    if "[" in split or "+" in split:
        raise ValueError(
            f"split: expected a plain name for a file, got {split!r}. Load the file, then use Dataset.select."
        )
