"""Pairs from any source and in any form as rows of one kind (see `convert`), read whole or as they are needed."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from dpop_trainer.data.arrow_cache import cached_arrow
from dpop_trainer.data.arrow_nulls import without_filled_nulls
from dpop_trainer.data.convert import ROW_FEATURES, bad_row, choose_form, convert_pairs, convert_record
from dpop_trainer.data.forms import Form
from dpop_trainer.data.load import load_pairs, open_source
from dpop_trainer.data.no_room import pass_no_room
from dpop_trainer.data.read_json import PlacedRecord, progress, read_json_records
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.sample import SAMPLE_SIZE, Item, sample_of_items
from dpop_trainer.data.sound_cache import cached_rows
from dpop_trainer.data.source_path import check_plain_split, json_file

_CHUNK = 1000  # rows that are held as Python objects at once


def read_pairs(
    source: str | os.PathLike | Dataset | DatasetDict,
    split: str = "train",
    *,
    name: str | None = None,
    revision: str | None = None,
    completions: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Read a data set of pairs in any form of `forms`, one row per record, good or bad.

    JSON is read a thousand records at a time into a memory-mapped Arrow file in the `datasets` cache, so a data set
    may be larger than the memory.

    Args:
        source: what `load_pairs` takes.
        split: which split of a hub data set, a folder or a DatasetDict.
        name: the configuration of a hub data set that has several.
        revision: the branch, tag or commit of a hub data set.
        completions: take prompt and completion too, for supervised fine-tuning.
        num_proc: processes that convert what is not JSON. None: this one.

    Returns:
        A data set with the columns of `convert.ROW_FEATURES`, for `tokenise_pairs`.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: nothing can be read from there, the columns are those of no form, or there is no usable record.
    """
    path = json_file(source)
    if path is None:
        dataset = load_pairs(source, split, name=name, revision=revision)
        origin = str(source) if isinstance(source, str | os.PathLike) else ""
        return convert_pairs(dataset, origin=origin, completions=completions, num_proc=num_proc)
    check_plain_split(split)

    def write(partial: Path) -> None:
        items = progress(path, read_json_records(path))
        first = list(itertools.islice(items, SAMPLE_SIZE))
        form = recognise_items(first, str(path), completions=completions)
        _write_rows((item_row(item, form) for item in itertools.chain(first, items)), partial)

    return cached_rows(cached_arrow(path, "rows", str(path), completions), write)


def recognise_items(first: list[Item], origin: str, *, completions: bool = False) -> Form:
    """The form of a data set, from its first records.

    Raises:
        ValueError: there is no record, none of them is usable, or their fields are those of no form.
    """
    return choose_form(sample_of_items(first, origin), origin, completions=completions)


def item_row(item: Item, form: Form) -> dict[str, Any]:
    """The row of a record, or of what is none."""
    return bad_row(item) if isinstance(item, BadRecord) else convert_record(item.record, item.place, form)


def stream_items(
    source: Any,
    split: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    epoch: int = 0,
    origin: str = "",
) -> Iterator[Item]:
    """The records of a source one by one, with nothing read before it is needed.

    Args:
        source: what `load_pairs` takes, or a streamed data set; one that shuffles does so for `epoch`.
        split: which split of a hub data set, a folder or a dict of splits.
        name: the configuration of a hub data set that has several.
        revision: the branch, tag or commit of a hub data set.
        epoch: the pass over the data.
        origin: what messages call a data set that is given; a path or a hub id says its own name.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: the source cannot be read, or has no such split.
    """
    path = json_file(source)
    if path is not None:
        check_plain_split(split)
        yield from read_json_records(path)
        return
    if isinstance(source, str | os.PathLike):
        origin = str(source)
        source = open_source(os.fspath(source), split, name, revision, streaming=True)
    if isinstance(source, DatasetDict | IterableDatasetDict):
        if split not in source:
            raise ValueError(f"split: expected one of {sorted(map(str, source))}, got {split!r}.")
        source = source[split]
    if not isinstance(source, Dataset | IterableDataset):
        raise ValueError(f"source: expected a path, a hub id or a data set, got {type(source).__name__}.")
    source = source.with_format(None)
    if isinstance(source, IterableDataset):
        source.set_epoch(epoch)
    prefix, index = f"{origin}, " if origin else "", -1
    try:
        for index, record in enumerate(source):
            yield PlacedRecord(f"{prefix}record {index}", without_filled_nulls(record))  # type: ignore[arg-type]
    except Exception as error:  # a file from elsewhere: its reader fails in any way
        pass_no_room(error)
        raise ValueError(
            f"{prefix}after record {index}: expected records that can be read, got an error of their reader's "
            f"({type(error).__name__}: {error}). If the file is damaged, write it anew."
        ) from error


def _write_rows(rows: Iterator[dict[str, Any]], path: Path) -> None:
    schema = ROW_FEATURES.arrow_schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while chunk := list(itertools.islice(rows, _CHUNK)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
