"""What the first records of a data set tell of all: its form, and the kinds of its pairs. Needs no `datasets`."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from dpop_trainer.data.forms import Form, Sample, recognise_form
from dpop_trainer.data.read_json import PlacedRecord, read_json_records
from dpop_trainer.data.records import PAIR_TYPES, BadRecord, Kind, Pair, TiedRecord, raise_bad_records
from dpop_trainer.data.vision import refuse_vision

Item: TypeAlias = PlacedRecord | BadRecord

SAMPLE_SIZE = 100
"""Records from which a form is recognised."""

_KINDS: dict[type, Kind] = {pair_type: kind for kind, pair_type in PAIR_TYPES.items()}


def kind_of(pair: Pair) -> Kind:
    """The kind of a pair."""
    return _KINDS[type(pair)]


def first_kinds(path: Path, *, completions: bool = False) -> set[Kind]:
    """The kinds of pairs among the first records of a JSON file; of records that are none, nothing.

    Args:
        path: the file.
        completions: prompt and completion are a form too.

    Raises:
        ValueError: the file cannot be read, or as `sample_of_items` and `form_of_sample`.
    """
    first = list(itertools.islice(read_json_records(path), SAMPLE_SIZE))
    form = form_of_sample(sample_of_items(first, str(path)), str(path), completions=completions)
    kinds = set()
    for item in first:
        if isinstance(item, PlacedRecord):
            try:
                kinds.add(kind_of(form.convert(item.record)))
            except (ValueError, RecursionError, TiedRecord):  # counted and told when all is read
                continue
    return kinds


def form_of_sample(sample: Sample, origin: str = "", *, completions: bool = False) -> Form:
    """The form of a data set.

    Raises:
        ValueError: the columns are those of no form, or hold images; names the origin.
    """
    refuse_vision(sample, origin or "dataset")
    try:
        return recognise_form(sample, completions=completions)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}" if origin else str(error)) from None


def sample_of_items(first: list[Item], origin: str = "") -> dict[str, Any]:
    """As `sample_of_records`, of what was read as records.

    Raises:
        ValueError: there is no record, or none of them is usable.
    """
    if not first:
        raise ValueError(f"source: expected at least one pair, got none{f' in {origin}' if origin else ''}.")
    records = [item.record for item in first if isinstance(item, PlacedRecord)]
    if not records:
        raise_bad_records(origin or "pairs", len(first), [item for item in first if isinstance(item, BadRecord)])
    return sample_of_records(records)


def sample_of_records(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Column -> its first value that is not null, from the first records of a data set without columns."""
    sample: dict[str, Any] = {}
    for record in itertools.islice(records, SAMPLE_SIZE):
        for column, value in record.items():
            if sample.get(column) is None:
                sample[column] = value
    return sample
