"""Records of any form -> rows that all have the same columns, good and bad records alike: none is lost on the way.

A row holds the pair as JSON, which keeps every message exactly as it was written (Arrow would give all of them the
keys of each), or what is wrong with the record; and where the record stands.
"""

import json
import logging
import math
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, Features, Value

from dpop_trainer.data.arrow_nulls import without_filled_nulls
from dpop_trainer.data.code_hash import code_hash
from dpop_trainer.data.forms import FORMS_BY_NAME, Form, Sample
from dpop_trainer.data.limits import RECORD, longest_record
from dpop_trainer.data.pair_weights import MARGIN_COLUMN, WEIGHT_COLUMN, read_weight
from dpop_trainer.data.records import (
    ALL_REF_COLUMNS,
    PAIR_TYPES,
    TIE,
    BadRecord,
    Kind,
    Pair,
    TiedRecord,
    raise_bad_records,
    read_ref_logps,
)
from dpop_trainer.data.sample import SAMPLE_SIZE, form_of_sample, kind_of, sample_of_records
from dpop_trainer.data.sound_cache import map_or_map_anew

_logger = logging.getLogger(__name__)

ROW_FEATURES = Features(
    {
        "kind": Value("string"),
        "pair": Value("large_string"),
        "place": Value("string"),
        "problem": Value("string"),
        "score_gap": Value("float64"),
        "weight": Value("float64"),
        **{column: Value("float64") for column in ALL_REF_COLUMNS},
    }
)

# what annotators or judges gave the two answers, as data sets name it
_SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_SIDE_COLUMNS = {
    *ALL_REF_COLUMNS,
    WEIGHT_COLUMN,
    MARGIN_COLUMN,
    *(name for names in _SCORE_COLUMNS for name in names),
}
_LONG = 1_000_000  # characters of a pair, which tokenisers take seconds for


def convert_record(record: dict[str, Any], place: str, form: Form) -> dict[str, Any]:
    """One row of `ROW_FEATURES`: the record's pair, that it is a tie, or the problem with it."""
    row = {**dict.fromkeys(ROW_FEATURES), "place": place}
    try:
        pair = form.convert(record)
        refs = read_ref_logps(record)
        notes = {"score_gap": _score_gap(record), "weight": read_weight(record)}
        text = _as_json(pair)
        if len(text) > _LONG:
            _logger.warning("%s: a pair of %.1f million characters, which takes a while.", place, len(text) / 1e6)
        row |= {"kind": kind_of(pair), "pair": text, **notes, **refs}
    except TiedRecord:
        row["kind"] = TIE
    except ValueError as error:
        row["problem"] = str(error)
    except RecursionError:
        row["problem"] = "record: expected values nested at most a few hundred deep, got deeper. Remove the record."
    return row


def bad_row(bad: BadRecord) -> dict[str, Any]:
    """The row of what could not even be read as a record."""
    return {**dict.fromkeys(ROW_FEATURES), "place": bad.place, "problem": bad.reason}


def row_pair(kind: Kind, pair: str) -> Pair:
    """The pair that a row holds."""
    return PAIR_TYPES[kind](**json.loads(pair))


def convert_pairs(
    dataset: Dataset, *, origin: str = "", completions: bool = False, num_proc: int | None = None
) -> Dataset:
    """The rows of a data set's records, one each, in order; rows are left as they are.

    Args:
        dataset: pairs in a form of `forms`.
        origin: what messages call the data set: "<origin>, record 7"; "record 7" without one.
        completions: take prompt and completion too, for supervised fine-tuning.
        num_proc: processes that convert. None: this one.

    Returns:
        A data set with the columns of `ROW_FEATURES`.

    Raises:
        ValueError: this is no Dataset, or its columns are those of no form.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}. "
            "Take one split, not streamed; load_pairs does."
        )
    if is_converted(dataset.column_names):
        return dataset
    dataset = dataset.with_format(None)
    try:
        return _converted(dataset, origin, completions=completions, num_proc=num_proc)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{_prefix(origin)} {_first_undecodable(dataset)}: expected text in UTF-8, got other bytes ({error}). "
            "Correct the record, or write the file anew."
        ) from error


def _converted(dataset: Dataset, origin: str, *, completions: bool, num_proc: int | None) -> Dataset:
    form = choose_form(_sample_of_columns(dataset), origin, completions=completions)
    columns = [column for column in dataset.column_names if column in form.columns or column in _SIDE_COLUMNS]
    source = dataset.select_columns(columns)
    return map_or_map_anew(
        source,
        _convert_batch,
        with_indices=True,
        batched=True,
        fn_kwargs={
            "form_name": form.name,
            "prefix": _prefix(origin),
            "code": code_hash(__name__),
        },
        remove_columns=columns,
        features=ROW_FEATURES,
        num_proc=num_proc,
        desc="Reading pairs",
    )


def _prefix(origin: str) -> str:
    return f"{origin}, record" if origin else "record"


def _first_undecodable(dataset: Dataset) -> int:
    for index in range(len(dataset)):
        try:
            dataset[index]
        except UnicodeDecodeError:
            return index
    raise AssertionError("a record cannot be read where all can")


def check_pairs(dataset: Dataset) -> Kind:
    """Check every record of a data set.

    Returns:
        The kind of its pairs.

    Raises:
        ValueError: columns are missing or of the wrong type, or records cannot be used; the message names the first
            five of these by index, with field, what was expected and what was found.
    """
    rows = convert_pairs(dataset)
    raise_bad_records("pairs", len(rows), bad_records(rows))
    kinds = [kind for kind in rows.unique("kind") if kind != TIE]
    if not kinds:
        raise ValueError(f"pairs: expected one that prefers an answer, got {len(rows)} ties.")
    return kinds[0]


def bad_records(rows: Dataset) -> list[BadRecord]:
    """The rows that hold no pair."""
    problems = rows.select_columns("problem").with_format("arrow")[:]["problem"]
    if problems.null_count == len(rows):
        return []
    bad = [index for index, problem in enumerate(problems.to_pylist()) if problem is not None]
    named = rows.select(bad).select_columns(["place", "problem"]).to_list()
    return [BadRecord(row["place"], row["problem"]) for row in named]


def is_converted(columns: Iterable[str]) -> bool:
    """Whether a data set with these columns is one of rows."""
    return set(columns) == set(ROW_FEATURES)


def choose_form(sample: Sample, origin: str = "", *, completions: bool = False) -> Form:
    """The form of a data set; tells in one log line which, and which columns it does not read.

    Raises:
        ValueError: the columns are those of no form, or hold images; names the origin.
    """
    form = form_of_sample(sample, origin, completions=completions)
    unused = [column for column in sample if column not in form.columns and column not in _SIDE_COLUMNS]
    _logger.warning(
        "%s form: %s%s",
        f"{origin}:" if origin else "Pairs:",
        form.name,
        f"; columns not read: {', '.join(unused)}" if unused else "",
    )
    return form


def _sample_of_columns(dataset: Dataset) -> dict[str, Any]:
    read = [column for column in dataset.column_names if any(column in form.columns for form in FORMS_BY_NAME.values())]
    sample: dict[str, Any] = dict.fromkeys(dataset.column_names)
    if read:
        first = dataset.select_columns(read).select(range(min(SAMPLE_SIZE, len(dataset))))
        sample |= sample_of_records(first)  # type: ignore[arg-type]
    return sample


def _convert_batch(
    batch: dict[str, list], indices: list[int], *, form_name: str, prefix: str, code: str
) -> dict[str, list]:
    form = FORMS_BY_NAME[form_name]
    rows = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        record = without_filled_nulls(dict(zip(batch, values, strict=True)))
        rows.append(convert_record(record, f"{prefix} {index}", form))
    return {column: [row[column] for row in rows] for column in ROW_FEATURES}


def _as_json(pair: Pair) -> str:
    try:
        text = json.dumps(pair._asdict(), ensure_ascii=False)
    except TypeError as error:  # a value that JSON does not know, from Parquet
        raise ValueError(f"record: expected text, numbers and lists of them, got another type ({error}).") from error
    if len(text) > longest_record():
        raise ValueError(
            f"record: expected at most {RECORD.told()} of text, got {len(text) / 2**20:.1f} MiB. Remove it, or cut its "
            "texts."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{_field_of_surrogate(pair)}: expected Unicode text, got half of a surrogate pair "
            f"({text[error.start]!r}). Correct the text or remove the record."
        ) from error
    return text


def _field_of_surrogate(pair: Pair) -> str:
    for field, value in pair._asdict().items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return field
    raise AssertionError("a field holds what the whole does")


def _score_gap(record: dict[str, Any]) -> float | None:
    """How much better the chosen answer was judged than the rejected one, where the record says so."""
    for names in ((MARGIN_COLUMN,), *_SCORE_COLUMNS):
        try:
            scores = [float(record[name]) for name in names]
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        gap = scores[0] - sum(scores[1:])
        return gap if math.isfinite(gap) else None
    return None
