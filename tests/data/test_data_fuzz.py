"""No input makes a loader fail without a message that names the record or the file, and no record is ever lost."""

import json
import logging
import re
import uuid

import datasets
import datasets.config
import pytest
from datasets import Dataset
from dpop_trainer.data import read_pairs, tokenise_pairs
from dpop_trainer.data.convert import convert_record
from dpop_trainer.data.forms import FORMS, recognise_form
from dpop_trainer.data.read_json import PlacedRecord, read_json_records
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.stream import SourceStream, TokenisedStream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from words import chat_tokenizer

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# half of a surrogate pair can be written in JSON, but is no text
texts = st.one_of(
    st.sampled_from(
        ["a", "a b", "", " ", "\x00", "\ud800", "é\r\n", "سلام", "👩‍👩‍👧", "\n\nHuman: a\n\nAssistant: b", "[{"]
    ),
    st.text(max_size=8),
)
whole_texts = texts.filter(lambda text: "\ud800" not in text)  # Arrow has no place for the other kind
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", ""])
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": roles, "content": st.one_of(texts, anything)}),
        st.fixed_dictionaries({"from": roles, "value": st.one_of(texts, anything)}),
    ),
    max_size=3,
)
ids = st.lists(st.integers(-1, 12), max_size=4)
values = st.one_of(texts, messages, ids, anything)
columns = sorted({column for form in FORMS for column in form.columns} | {"ref_chosen_logps", "score_chosen", "other"})
USER, RIGHT, WRONG = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
ASKED, GOOD, BAD = ({"from": r, "value": c} for r, c in (("human", "a"), ("gpt", "b"), ("gpt", "c")))
USABLE = [
    {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    {"input": {"messages": [USER]}, "preferred_output": [RIGHT], "non_preferred_output": [WRONG]},
    {"conversations": [ASKED], "chosen": GOOD, "rejected": BAD},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
    {"prompt": json.dumps([USER]), "chosen": json.dumps([RIGHT]), "rejected": json.dumps([WRONG])},
    {"question": "a", "chosen": "b", "rejected": "c"},
    {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
    {"prompt": "a", "chosen": " b", "rejected": " c"},
]


def spoiled(record):
    """Records like it: most fields as they are, some with any value, and perhaps a field more."""
    more = [column for column in columns if column not in record]
    return st.one_of(
        st.just(record),
        st.fixed_dictionaries(
            {column: st.one_of(st.just(value), st.just(value), values) for column, value in record.items()}
        ),
        st.tuples(st.just(record), st.dictionaries(st.sampled_from(more), values, max_size=1)).map(
            lambda both: {**both[0], **both[1]}
        ),
    )


records_of_a_form = st.sampled_from(USABLE).flatmap(lambda record: st.lists(spoiled(record), min_size=1, max_size=6))


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    datasets.enable_progress_bars()


def num_accounted(counts):
    return (
        counts.num_pairs
        + counts.skipped_bad
        + counts.dropped_empty
        + counts.dropped_no_room
        + counts.dropped_identical
        + counts.dropped_identical_after_truncation
    )


@FUZZ
@given(records=records_of_a_form)
def test_records_of_every_form(tmp_path, records):
    """From a file, read whole or as a stream: all records come out, or the message names file or data set."""
    path = tmp_path / f"{uuid.uuid4()}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    skipped = []
    try:
        _, counts = tokenise_pairs(
            read_pairs(path),
            chat_tokenizer(),
            max_length=4,
            vocab_size=11,
            on_bad_record="skip",
            on_skipped=skipped.extend,
        )
    except ValueError as error:
        assert re.search(f"{path}|^dataset: expected at least one pair that can be used", str(error))  # noqa: PT017
        return
    assert counts.num_pairs_in == len(records) == num_accounted(counts)
    assert counts.skipped_bad == len(skipped)
    assert all(bad.place.startswith(f"{path}, line ") and bad.reason for bad in skipped)
    stream = TokenisedStream(
        SourceStream(path), chat_tokenizer(), name="fuzz", max_length=4, vocab_size=11, on_bad_record="skip"
    )
    assert len(list(stream)) == counts.num_pairs
    assert stream.counts == counts


@FUZZ
@given(record=st.dictionaries(st.sampled_from(columns), values, max_size=5))
def test_any_record_is_a_pair_or_a_named_problem(record):
    try:
        form = recognise_form(record)
    except ValueError as error:
        assert str(error).startswith("columns: expected ")  # noqa: PT017
        return
    row = convert_record(record, "record 7", form)
    assert (row["pair"] is None) == (row["problem"] is not None)
    assert row["place"] == "record 7"
    assert row["problem"] is None or "expected" in row["problem"]


@FUZZ
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=12),
            st.dictionaries(texts, scalars, max_size=2).map(lambda record: json.dumps(record).encode()),
        ),
        max_size=6,
    )
)
def test_any_bytes_as_lines(tmp_path, lines):
    """Every line that is not blank is a record or a bad one, at its number."""
    lines = [line.replace(b"\n", b"") for line in lines]
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    if lines and lines[0].startswith(b"\xef\xbb\xbf"):  # a byte order mark is not content
        lines[0] = lines[0][3:]
    items = list(read_json_records(path))
    assert all(isinstance(item, PlacedRecord | BadRecord) for item in items)
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    assert [item.place for item in items] == [f"{path}, line {number}" for number in numbers]


@FUZZ
@given(
    values=st.lists(st.one_of(st.dictionaries(texts, anything, max_size=3), anything), max_size=5),
    indent=st.sampled_from([None, 2]),
    cut=st.integers(0, 40),
)
def test_any_json_list(tmp_path, values, indent, cut):
    """Whole, it gives what `json` gives; with its end cut off, it gives those before and names the file."""
    whole = json.dumps(values, indent=indent)
    path = tmp_path / "any.json"
    path.write_text(whole)
    items = list(read_json_records(path))
    assert len(items) == len(values)
    for item, value in zip(items, values, strict=True):
        assert isinstance(item, PlacedRecord) == isinstance(value, dict)
        if isinstance(item, PlacedRecord):
            assert repr(item.record) == repr(json.loads(json.dumps(value)))  # NaN equals nothing
    path.write_text(whole[: max(1, len(whole) - 1 - cut)])
    with pytest.raises(ValueError, match="expected a JSON list of records") as raised:
        list(read_json_records(path))
    assert str(raised.value).startswith(f"{path}: ")


@FUZZ
@given(records=st.lists(st.tuples(whole_texts, whole_texts, whole_texts), min_size=1, max_size=6))
def test_data_sets_in_memory(records):
    dataset = Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), record, strict=True)) for record in records]
    )
    try:
        _, counts = tokenise_pairs(dataset, chat_tokenizer(), on_bad_record="skip")
    except ValueError as error:
        assert str(error).startswith("dataset: expected at least one pair that can be used")  # noqa: PT017
        return
    assert counts.num_pairs_in == len(dataset) == num_accounted(counts)
