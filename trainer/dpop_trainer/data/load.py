"""Preference pairs from where the user keeps them (a file, a folder, the Hugging Face hub, memory) as a Dataset."""

import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from dpop_trainer.data.arrow_cache import cached_arrow
from dpop_trainer.data.no_room import pass_no_room
from dpop_trainer.data.read_json import PlacedRecord, all_records
from dpop_trainer.data.sound_cache import cached_rows, load_or_load_anew
from dpop_trainer.data.source_path import check_source_path, expanded, loader_of

# of a file of Arrow's, and of a stream
_ARROW_FILE, _END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\x00\x00\x00\x00"


def load_pairs(
    source: str | os.PathLike | Dataset | DatasetDict,
    split: str = "train",
    *,
    name: str | None = None,
    revision: str | None = None,
) -> Dataset:
    """Load a data set of pairs, with whatever columns it has.

    JSON files are read here rather than by `datasets`, so that a bad line is named and no text turns into a date.
    The result is kept in the `datasets` cache under the file's contents, so that what is computed from it is cached
    as well.

    Args:
        source: a file (.jsonl, .json as a list of records or one record per line, both also as .gz, .parquet,
            .arrow), a folder (written by `save_to_disk`, or of data files), the id of a data set on the hub, or a
            data set.
        split: which split of a hub data set, a folder or a DatasetDict. A file and a Dataset are one split, whatever
            it is called.
        name: the configuration of a hub data set that has several.
        revision: the branch, tag or commit of a hub data set.

    Returns:
        A Dataset with at least one row.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: a line or record is not a JSON object, two records disagree about a field's type (the message
            names file and line), the file cannot be read, the split is missing, or there are no rows.
    """
    if isinstance(source, (Dataset, DatasetDict)):
        dataset, origin = source, "the data set given"
    elif isinstance(source, (str, os.PathLike)):
        dataset, origin = open_source(os.fspath(source), split, name, revision), os.fspath(source)
    else:
        raise ValueError(
            f"source: expected a path, a hub id, a Dataset or a DatasetDict, got {type(source).__name__}. "
            "Load a streamed data set without streaming: pairs are counted before training."
        )
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"split: expected one of {sorted(map(str, dataset))} of {origin}, got {split!r}.")
        dataset = dataset[split]
    if len(dataset) == 0:
        raise ValueError(f"source: expected at least one pair, got none in {origin}.")
    return dataset


def open_source(
    source: str, split: str, name: str | None = None, revision: str | None = None, *, streaming: bool = False
) -> Any:
    """What `datasets` makes of a path or hub id: a Dataset, a DatasetDict or, when streaming, their iterable kin.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: the file is of another kind or cannot be read, or a slice of a file is asked for.
    """
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    path = expanded(source)
    if path.is_dir():
        try:
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                for file in sorted(path.rglob("*.arrow")):
                    _check_end(file)
                return datasets.load_from_disk(str(path))
            return load_or_load_anew(str(path), name, split=split, **options)
        except Exception as error:  # files from elsewhere: their readers fail in any way
            pass_no_room(error)
            raise ValueError(
                f"source: expected a folder of data files or one that save_to_disk wrote, got {source} "
                f"({_reason(error)}). Name one file of it, or another folder."
            ) from error
    check_source_path(source, split)
    if path.is_file():
        loader = loader_of(path)
        assert loader is not None
        if loader == "json":
            return _read_json(path)
        try:
            if loader == "arrow":
                _check_end(path)
            return load_or_load_anew(loader, data_files=str(path), split="train", **options)
        except Exception as error:  # a file from elsewhere: its reader fails in any way
            pass_no_room(error)
            raise ValueError(
                f"source: expected a readable {path.suffix} file, got {path} ({_reason(error)}). Write it anew, with "
                "text, numbers and lists or structs of them; or as JSON, one record per line (.jsonl)."
            ) from error
    try:
        return load_or_load_anew(source, name, split=split, revision=revision, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"source: expected a file, a folder or a data set on the hub, got {source!r}, which is neither of the "
            f"first two in {Path.cwd()}. Check the name, and log in if the data set is private or gated. Asking the "
            f"hub: {error}"
        ) from error
    except Exception as error:  # a data set from elsewhere: its reader fails in any way
        pass_no_room(error)
        raise ValueError(
            f"source: expected a data set on the hub that can be read, got {source!r}. {type(error).__name__}: {error}"
        ) from error


def _check_end(path: Path) -> None:
    """Arrow's stream of batches reads as whole wherever it was cut between two of them, but for the mark at its end.

    Raises:
        ValueError: the mark is missing.
    """
    with path.open("rb") as file:
        is_stream = file.read(len(_ARROW_FILE)) != _ARROW_FILE
        file.seek(max(0, path.stat().st_size - len(_END_OF_STREAM)))
        if is_stream and file.read() != _END_OF_STREAM:
            raise ValueError(f"{path.name} has no end: it was cut, or is still being written")


def _reason(error: Exception) -> str:
    """The first line, where schemas of all columns may follow."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    text = str(cause).strip().partition("\n")[0]
    return text if isinstance(cause, ValueError) and text else f"{type(cause).__name__}: {text}"


def _read_json(path: Path) -> Dataset:
    def write(partial: Path) -> None:
        records = all_records(path)
        if not records:
            raise ValueError(f"source: expected at least one pair, got none in {path}.")
        _write_arrow(_as_table(records), partial)

    return cached_rows(cached_arrow(path, "raw"), write)


def _as_table(records: list[PlacedRecord]) -> pa.Table:
    columns = {}
    for field in dict.fromkeys(field for _, record in records for field in record):
        values = [record.get(field) for _, record in records]
        problem = _arrow_problem(values)
        if problem:
            place = records[_first_misfit(values)].place
            raise ValueError(
                f"{place}: {field}: expected a value of the same type as in the records before, got another "
                f"({problem}). Give the field one type in the whole file, or remove it."
            )
        columns[field] = pa.array(values)
    return pa.table(columns)


def _arrow_problem(values: list) -> str | None:
    try:
        pa.array(values)
    except (pa.ArrowException, UnicodeError, OverflowError) as error:
        return str(error)
    return None


def _first_misfit(values: list) -> int:
    """Index of the first value that has no common type with all before it."""
    num_good, num_bad = 0, len(values)
    while num_bad - num_good > 1:
        middle = (num_good + num_bad) // 2
        if _arrow_problem(values[:middle]):
            num_bad = middle
        else:
            num_good = middle
    return num_bad - 1


def _write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
