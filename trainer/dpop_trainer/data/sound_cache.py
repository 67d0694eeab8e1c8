"""Caches that are what was written: each file has its hash and its rows beside it, and one that differs is made anew.

    pairs.arrow        rows
    pairs.arrow.seal   {"bytes": ..., "xxh3_128": ..., "rows": ...}, written after it

A file is used where its seal matches it. Else, as after a kill, a full disk or a turned byte, it is made anew once, and
a line says so. Two processes that make the same file replace each other's by the same.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from dpop_trainer.data.digests import digest_of
from dpop_trainer.data.partial_files import replacing

logger = logging.getLogger(__name__)

_UNREADABLE = (OSError, pa.ArrowException, DatasetGenerationError)


def cached_rows(path: Path, write: Callable[[Path], None]) -> Dataset:
    """The data set of a cached Arrow file.

    Args:
        path: where it is, or is to be.
        write: makes it, given where to.
    """
    problem = _problem(path)
    if problem is not None:
        if path.exists():
            _tell(str(path), problem)
        with replacing(path) as partial:
            write(partial)
        _seal(path, len(Dataset.from_file(str(path))))
    return Dataset.from_file(str(path))


def map_or_map_anew(dataset: Dataset, function: Any, **options: Any) -> Dataset:
    """`Dataset.map`, whose cached result is computed again where it is not what was written.

    Raises:
        ValueError: the cache cannot be written either.
    """
    there_before = _files_beside(dataset)
    try:
        mapped = dataset.map(function, **options)
        problem = next(filter(None, map(_problem, set(_files(mapped)) & there_before)), None)
    except _UNREADABLE as error:
        mapped, problem = None, str(error)
    if mapped is None or problem is not None:
        _tell(f"the cached result of {options.get('desc')!r}", problem)
        try:
            mapped = dataset.map(function, **options, load_from_cache_file=False)
        except OSError as error:
            folders = sorted({str(path.parent) for path in _files(dataset)}) or ["the system's own"]
            raise ValueError(
                f"dataset: expected to write tokenised pairs to the cache in {', '.join(folders)}, got {error}. Make "
                "room there, or set HF_DATASETS_CACHE to a folder on a larger disk."
            ) from error
        there_before = set()
    _seal_all(mapped, but=there_before)
    return mapped


def load_or_load_anew(*args: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, which makes its cache anew where that holds other rows than it says or its seal."""
    if options.get("streaming"):
        return datasets.load_dataset(*args, **options)
    loaded = datasets.load_dataset(*args, **options)
    if not isinstance(loaded, Dataset):
        return loaded
    known = (loaded.info.splits or {}).get(str(loaded.split))
    problem = next(filter(None, (_problem(path) for path in _files(loaded) if _seal_of(path).exists())), None)
    if problem is None and known is not None and known.num_examples not in (None, 0, len(loaded)):
        problem = f"{len(loaded)} of its {known.num_examples} rows"
    if problem is not None:
        _tell(f"the cached data set {args[0]!r}", problem)
        loaded = datasets.load_dataset(*args, **options, download_mode="reuse_cache_if_exists")
    _seal_all(loaded)
    return loaded


def _problem(path: Path) -> str | None:
    """What is wrong with a cached file; None if it is what was written."""
    try:
        sealed = json.loads(_seal_of(path).read_text())
        found = {**digest_of(path), "rows": sealed["rows"]}
    except FileNotFoundError:
        return "a file that was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"a file that cannot be read ({error})"
    if found == sealed:
        return None
    return f"a file of {found['bytes']} bytes that is not what was written there ({sealed.get('bytes')} bytes)"


def _seal_all(dataset: Dataset, but: set[Path] | None = None) -> None:
    for path in set(_files(dataset)) - (but or set()):
        _seal(path, len(dataset))


def _seal(path: Path, num_rows: int) -> None:
    """Rows are those of the whole data set, which may have several files."""
    seal = _seal_of(path)
    try:
        with replacing(seal) as partial:
            partial.write_text(json.dumps({**digest_of(path), "rows": num_rows}))
    except OSError as error:  # then it is made anew next time
        logger.warning("%s: not written (%s); the data are read anew next time.", seal, error)


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")


def _files(dataset: Dataset) -> list[Path]:
    return [Path(file["filename"]) for file in dataset.cache_files]


def _files_beside(dataset: Dataset) -> set[Path]:
    """Cached results that are there already, of this data set and others in its folder."""
    return {path for folder in {path.parent for path in _files(dataset)} for path in folder.glob("*.arrow")}


def _tell(what: str, problem: str | None) -> None:
    logger.warning("%s: expected a cache as it was written, got %s. Reading the data anew.", what, problem)
