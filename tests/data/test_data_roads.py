"""A record's tokens do not depend on the road it came by: JSON, Parquet, streamed, in memory.

Arrow, through which all roads but JSON lead, gives every object the keys of all objects of its column. The expected
tokens are those of a template that is rendered by hand from the records as they were written.
"""

import json

import datasets.config
import pytest
from datasets import Dataset, IterableDataset, load_dataset
from dpop_trainer.data import SourceStream, TokenisedStream, load_pairs, read_pairs, tokenise_pairs
from dpop_trainer.data.dataset_source import parse_sources
from dpop_trainer.data.mixture import mix_pairs, mix_streams
from words import character_tokenizer, text_of

COLUMNS = ["tools", "tool_calls", "messages", "chat_template_kwargs"]
FORMS = {"messages": COLUMNS, "implicit": COLUMNS, "openai": COLUMNS[:3]}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def two_of(column):
    """Two values of a column with keys of their own at several depths: (tools, template arguments, calls, more)."""
    tools, options, calls, more = [None, None], [None, None], [None, None], [{}, {}]
    if column == "tools":
        tools = [
            [{"name": "add", "parameters": {"properties": {"role": {"type": "integer"}}, "required": ["role", None]}}],
            [{"name": "say", "parameters": {"properties": {"content": {"enum": ["a"]}}}}, {"name": "stop"}],
        ]
    elif column == "chat_template_kwargs":
        options = [{"options": {"deep": [{"a": 1}]}}, {"flag": True, "options": {"deep": [{"b": {"c": "x"}}]}}]
    elif column == "tool_calls":
        calls = [
            [{"function": {"name": "add", "arguments": {"value": 2}}}],
            [{"function": {"name": "say", "arguments": {"content": {"from": "y"}}}, "id": "1"}],
        ]
    else:
        more = [{"name": "ada"}, {"meta": {"source": {"page": 3}}}]
    return list(zip(tools, options, calls, more, strict=True))


def record_of(form, index, tools, options, calls, more):
    answers = [{"role": "assistant", "content": f"{index}{name}", **more} for name in ("right", "wrong")]
    for answer in answers:
        if calls is not None:
            answer["tool_calls"] = calls
    asked = {"role": "user", "content": f"{index}?"}
    columns = {name: value for name, value in (("tools", tools), ("chat_template_kwargs", options)) if value}
    if form == "messages":
        return {"prompt": [asked], "chosen": answers[:1], "rejected": answers[1:], **columns}
    if form == "implicit":
        return {"chosen": [asked, answers[0]], "rejected": [asked, answers[1]], **columns}
    given = {"messages": [asked], **({"tools": tools} if tools else {})}
    return {"input": given, "preferred_output": answers[:1], "non_preferred_output": answers[1:]}


def by_hand(index, tools, options, calls, more):
    """The texts of the prompt and of both answers, as the template is to write them."""
    options = options or {}
    asked = {"role": "user", "content": f"{index}?"}
    head = f"{json.dumps(tools)}|{json.dumps(options.get('options', {}))}|{'flag' in options}|{json.dumps(asked)};"
    last = {**more, "tool_calls": calls} if calls else more
    right, wrong = ({"role": "assistant", "content": f"{index}{name}", **last} for name in ("right", "wrong"))
    return head, f"{json.dumps(right)};", f"{json.dumps(wrong)};"


def roads(path, records):
    """Name of a road -> what makes its data set: those that are read whole, and those that are streamed."""
    (path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = path / "hub"
    folder.mkdir()
    Dataset.from_list(records).to_parquet(str(folder / "train.parquet"))
    jsonl, parquet = str(path / "pairs.jsonl"), str(folder / "train.parquet")
    whole = {
        "jsonl": lambda: read_pairs(jsonl),
        "jsonl as a data set": lambda: load_pairs(jsonl),
        "parquet": lambda: read_pairs(parquet),
        "folder": lambda: read_pairs(str(folder)),
        "from_list": lambda: Dataset.from_list(records),
        "mixture": lambda: mix_pairs(parse_sources([jsonl, parquet], "x"), seed=0),
    }
    streamed = {
        "jsonl": lambda: SourceStream(jsonl),
        "parquet": lambda: SourceStream(parquet),
        "folder": lambda: SourceStream(str(folder)),
        "generator": lambda: SourceStream(IterableDataset.from_generator(lambda: iter(records))),
        "iterable": lambda: SourceStream(Dataset.from_list(records).to_iterable_dataset()),
        "load_dataset": lambda: SourceStream(load_dataset(str(folder), split="train", streaming=True)),
        "mixture": lambda: mix_streams(parse_sources([jsonl, parquet], "x"), seed=0),
    }
    return whole, streamed


@pytest.mark.parametrize(("form", "column"), [(form, column) for form, columns in FORMS.items() for column in columns])
def test_same_tokens_by_every_road(tmp_path, tokenizer, form, column):
    values = two_of(column)
    records = [record_of(form, index, *value) for index, value in enumerate(values)]
    whole, streamed = roads(tmp_path, records)
    expected = {by_hand(index, *value) for index, value in enumerate(values)}
    assert len(expected) == 2
    for name, road in whole.items():
        assert {text_of(row) for row in tokenise_pairs(road(), tokenizer)[0]} == expected, name
    for name, road in streamed.items():
        stream = TokenisedStream(road(), tokenizer, name="train")
        assert {text_of(row) for row in stream.first_records(2 if name != "mixture" else 16)} == expected, name
