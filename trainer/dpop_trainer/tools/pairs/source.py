"""Records from where they are kept, one at a time: a file, or a data set on the hub. A bad one is named, not raised."""

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


class SourceRecord(NamedTuple):
    """A record and where it stands, or what stands there instead."""

    index: int
    """Its number among the records, from 0."""
    place: str
    """For messages: "line 7" or "record 6"."""
    record: dict[str, Any] | None
    problem: str | None
    """What is wrong where there is no record."""
    consumed: int
    """How much of the source has been read, in its unit."""


class Source(NamedTuple):
    """Records, to be read once."""

    name: str
    path: Path | None
    """None for the hub."""
    records: Iterable[SourceRecord]
    size: int | None
    """Of the whole source, in `unit`."""
    unit: str
    """"B" (bytes) or "records"."""
    license: str | None
    """What the hub says."""

    def __iter__(self) -> Iterator[SourceRecord]:  # type: ignore[override]
        return iter(self.records)


def open_source(source: str, *, split: str = "train", config: str | None = None) -> Source:
    """A source by name. Lines and Parquet row groups are streamed; a .json list is parsed whole.

    Args:
        source: a file (.jsonl, .jsonl.gz, .json as a list or one record per line, .parquet) or a hub id.
        split: of a hub data set.
        config: of a hub data set that has several.

    Raises:
        FileNotFoundError: there is no such file or hub data set.
        ValueError: the file is of another kind, or cannot be read.
    """
    path = Path(source).expanduser()
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if path.is_file():
        if suffix not in _SUFFIXES:
            raise ValueError(f"source: expected a file ending in {', '.join(_SUFFIXES)}, got {source}.")
        if suffix == ".parquet":
            return _parquet(path)
        if suffix == ".json" and _begins_with_bracket(path):
            return _json_list(path)
        return Source(path.name, path, _lines(path), path.stat().st_size, "B", None)
    if path.is_dir() or suffix in _SUFFIXES or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(
            f"source: expected a file or a hub id, got {source}. Check the path; a relative one begins at {Path.cwd()}."
        )
    return _hub(source, split, config)


def license_of(path: Path) -> tuple[str, Path] | None:
    """The licence that lies beside a file -> its title and where it is: LICENSE.<name>, LICENSE, COPYING."""
    stem = path.name.partition(".")[0]
    for name in (f"LICENSE.{stem}", "LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING"):
        candidate = path.with_name(name)
        if candidate.is_file():
            lines = candidate.read_text(encoding="utf-8", errors="replace").splitlines()
            titles = [line.strip(" \t#*/") for line in lines if line.strip(" \t#*/")]
            if titles:
                # "Apache License" / "Version 2.0, January 2004"
                second = titles[1] if len(titles) > 1 and titles[1].lower().startswith("version") else ""
                return ", ".join(filter(None, [titles[0], second])), candidate
    return None


def _lines(path: Path) -> Iterator[SourceRecord]:
    is_zipped = path.suffix == ".gz"
    index = consumed = 0
    with _named_read_errors(path), path.open("rb") as file, gzip.open(file) if is_zipped else file as lines:
        for number, line in enumerate(lines, start=1):
            # a file that is read by lines does not tell its position; the bytes behind gzip do
            consumed = file.tell() if is_zipped else consumed + len(line)
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield _parsed(line, index, f"line {number}", consumed)
                index += 1


def _parsed(line: bytes, index: int, place: str, consumed: int) -> SourceRecord:
    try:
        record = json.loads(line)  # decodes UTF-8 with or without a byte order mark
    except (ValueError, RecursionError) as error:
        return SourceRecord(index, place, None, f"expected a JSON object, got {error}.", consumed)
    return _checked(record, index, place, consumed)


def _checked(record: Any, index: int, place: str, consumed: int) -> SourceRecord:
    if not isinstance(record, dict):
        problem = f"expected a JSON object, got {type(record).__name__}."
        return SourceRecord(index, place, None, problem, consumed)
    return SourceRecord(index, place, record, None, consumed)


def _begins_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_list(path: Path) -> Source:
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON list of records, got what does not parse ({error}).") from error
    checked = (_checked(record, i, f"record {i}", i + 1) for i, record in enumerate(records))
    return Source(path.name, path, checked, len(records), "records", None)


def _parquet(path: Path) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source: expected a readable .parquet file, got {path} ({error}).") from error

    def records() -> Iterator[SourceRecord]:
        count = itertools.count()
        with _named_read_errors(path):
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    index = next(count)
                    yield SourceRecord(index, f"record {index}", record, None, index + 1)

    return Source(path.name, path, records(), file.metadata.num_rows, "records", None)


def _hub(source: str, split: str, config: str | None) -> Source:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = datasets.load_dataset(source, config, split=split, streaming=True)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"source: expected a file or a data set on the hub, got {source!r}. Check the name, and log in if it is "
            f"private or gated. The hub says: {error}"
        ) from error
    records = (_checked(dict(record), i, f"record {i}", i + 1) for i, record in enumerate(dataset))
    size = None
    if dataset.info.splits and split in dataset.info.splits:
        size = dataset.info.splits[split].num_examples or None
    return Source(source, None, records, size, "records", dataset.info.license or None)


@contextmanager
def _named_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise ValueError(f"source: expected a readable file, got {path} ({error}).") from error
