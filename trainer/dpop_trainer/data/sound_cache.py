"""Caches that a killed process or a full disk has left cut short: made anew, and said, instead of trusted or fatal."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

logger = logging.getLogger(__name__)


def drop_unreadable(path: Path) -> None:
    """Remove a cached Arrow file that cannot be read, so that whoever needs it writes it again."""
    if not path.exists():
        return
    try:
        Dataset.from_file(str(path))
    except (OSError, pa.ArrowInvalid) as error:
        logger.warning(
            "%s: expected a cached data set, got an unreadable file (%s). Reading the data anew.", path, error
        )
        path.unlink(missing_ok=True)


def map_or_map_anew(dataset: Dataset, function: Any, **options: Any) -> Dataset:
    """`Dataset.map`, whose cached result is computed again where it cannot be read.

    Raises:
        ValueError: the cache cannot be written either.
    """
    try:
        return dataset.map(function, **options)
    except (OSError, pa.ArrowInvalid) as error:
        logger.warning("The cached result of %r cannot be used (%s). Computing it anew.", options.get("desc"), error)
    try:
        return dataset.map(function, **options, load_from_cache_file=False)
    except OSError as error:
        folders = sorted({str(Path(file["filename"]).parent) for file in dataset.cache_files}) or ["the system's own"]
        raise ValueError(
            f"dataset: expected to write tokenised pairs to the cache in {', '.join(folders)}, got {error}. Make room "
            "there, or set HF_DATASETS_CACHE to a folder on a larger disk."
        ) from error
