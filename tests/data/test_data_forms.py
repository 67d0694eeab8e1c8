"""Every form of pairs is recognised by its columns and read as it was written, and bad records of each are named."""

import json
import logging
import re
from pathlib import Path

import datasets.config
import pytest
from datasets import Dataset
from dpop_trainer.data import check_pairs, read_pairs
from dpop_trainer.data.convert import ROW_FEATURES, convert_pairs, row_pair
from dpop_trainer.data.forms import FORMS, FORMS_BY_NAME, recognise_form
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import MessagesPair, TextPair

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(speaker, value):
    return {"from": speaker, "value": value}


ASKED, RIGHT, WRONG = turn("user", "2 + 2?"), turn("assistant", "4"), turn("assistant", "5")
PAIR = MessagesPair([ASKED], [RIGHT], [WRONG], {"tools": None})


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs_of(rows):
    assert set(rows.column_names) == set(ROW_FEATURES)
    return [row["problem"] or row_pair(row["kind"], row["pair"]) for row in rows]


def both_ways(tmp_path, record):
    """What a record becomes when read from JSON, and when a data set in memory holds it."""
    (from_json,) = pairs_of(read_pairs(write(tmp_path / "pairs.jsonl", record)))
    (from_memory,) = pairs_of(convert_pairs(Dataset.from_list([record])))
    return from_json, from_memory


def test_documented_examples(tmp_path, caplog):
    """docs/data.md shows one record of each form, in the registry's order, and says what it becomes."""
    (block,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    records = [json.loads(line) for line in block.splitlines()]
    text = TextPair("2 + 2?", "4", "5")
    whole = TextPair("2 + 2?", " 4", " 5")
    expected = [PairIds([1, 42, 17], [5, 2], [6, 2]), *[PAIR] * 7, text, whole, TextPair("2 + 2?", "4", "4")]
    assert len(records) == len(expected) == len(FORMS_BY_NAME)
    for record, pair, (name, form) in zip(records, expected, FORMS_BY_NAME.items(), strict=True):
        completions = "completion" in record
        assert recognise_form(record, completions=completions) is form
        caplog.clear()
        path = write(tmp_path / "pairs.jsonl", record)
        (row,) = read_pairs(path, completions=completions)
        assert row_pair(row["kind"], row["pair"]) == pair
        (line,) = [entry.getMessage() for entry in caplog.records]
        assert line == f"{path}: form: {name}"
        assert pairs_of(convert_pairs(Dataset.from_list([record]), completions=completions)) == [pair]
        assert row["score_gap"] == (7.0 if "score_chosen" in record else None)


def test_columns_not_read_are_told(tmp_path, caplog):
    record = {"prompt": "a", "chosen": "b", "rejected": "c", "id": 7, "source": "x", "score_chosen": 1}
    read_pairs(write(tmp_path / "pairs.jsonl", record))
    assert caplog.messages == [f"{tmp_path / 'pairs.jsonl'}: form: text; columns not read: id, source"]
    caplog.set_level(logging.WARNING)
    convert_pairs(Dataset.from_list([record]))
    assert caplog.messages[1:] == ["Pairs: form: text; columns not read: id, source"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        pytest.param(
            {
                "conversations": [said("system", "s"), said("Human", "q"), said("gpt", "a"), said("user", "2 + 2?")],
                "chosen": [said("gpt", "4")],
                "rejected": [said("assistant", "5")],
            },
            PAIR._replace(prompt=[turn("system", "s"), turn("user", "q"), turn("assistant", "a"), ASKED]),
            id="turns of several speakers",
        ),
        pytest.param(
            {
                "system": "be exact",
                "tools": '[{"name": "add"}]',
                "conversations": [
                    said("human", "2 + 2?"),
                    said("function_call", '{"name": "add", "arguments": {"a": 2}}'),
                    said("observation", "4"),
                ],
                "chosen": said("gpt", "4"),
                "rejected": said("gpt", "5"),
            },
            MessagesPair(
                [
                    turn("system", "be exact"),
                    ASKED,
                    turn(
                        "assistant",
                        "",
                        tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
                    ),
                    turn("tool", "4"),
                ],
                [RIGHT],
                [WRONG],
                {"tools": [{"name": "add"}]},
            ),
            id="system, tools and calls",
        ),
        pytest.param(
            {
                "input": {"messages": [ASKED], "tools": [{"name": "add"}], "parallel_tool_calls": True},
                "preferred_output": [RIGHT],
                "non_preferred_output": [WRONG],
            },
            PAIR._replace(template_options={"tools": [{"name": "add"}]}),
            id="tools of the OpenAI form",
        ),
        pytest.param(
            {"instruction": "Add.", "input": "2 + 2", "chosen": "4", "rejected": "5", "history": [["hi", "hello"]]},
            PAIR._replace(prompt=[turn("user", "hi"), turn("assistant", "hello"), turn("user", "Add.\n2 + 2")]),
            id="instruction, input, history",
        ),
        pytest.param(
            {"instruction": "2 + 2?", "input": "", "chosen_response": "4", "rejected_response": "5"},
            PAIR,
            id="instruction and responses",
        ),
        pytest.param({"input": "2 + 2?", "chosen": "4", "rejected": "5"}, PAIR, id="input as the question"),
        pytest.param(
            {"system": "s", "prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
            PAIR._replace(prompt=[turn("system", "s"), ASKED]),
            id="prompt beside system",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2 + 2?\n\nAssistant: 4",
                "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2 + 2?\n\nAssistant:5\n",
            },
            PAIR._replace(prompt=[turn("user", "hi"), turn("assistant", "hello"), ASKED]),
            id="transcript of several turns",
        ),
        pytest.param(
            {"chosen": "2 + 2 = 4", "rejected": "2 + 2 makes"}, TextPair("2 + 2", " = 4", " makes"), id="whole texts"
        ),
        pytest.param({"chosen": "It is 12", "rejected": "It is 13"}, TextPair("It is 1", "2", "3"), id="within a word"),
        pytest.param({"chosen": "a b", "rejected": "a b c"}, TextPair("a ", "b", "b c"), id="one goes on"),
        pytest.param({"chosen": "a b", "rejected": "a b"}, TextPair("a ", "b", "b"), id="the same whole texts"),
        pytest.param(
            {
                "prompt": "2 + 2?",
                "chosen": [ASKED, RIGHT],
                "rejected": [ASKED, WRONG],
                "messages": [ASKED, RIGHT],
                "score_chosen": 6.0,
                "score_rejected": 6.0,
            },
            PAIR,
            id="UltraFeedback",
        ),
        pytest.param(
            {
                "prompt": [turn("user", [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}])],
                "chosen": [RIGHT],
                "rejected": [WRONG],
            },
            PAIR,
            id="content in parts",
        ),
    ],
)
def test_records_of_each_form(tmp_path, record, expected):
    from_json, from_memory = both_ways(tmp_path, record)
    assert from_json == expected
    assert from_memory == expected


SHAREGPT = {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")}
OPENAI = {"input": {"messages": [ASKED]}, "preferred_output": [RIGHT], "non_preferred_output": [WRONG]}
QUESTION = {"question": "q", "system": "s", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
WHOLE = {"chosen": "2 + 2? 4", "rejected": "2 + 2? 5"}
TOKENS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
MESSAGES = {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]}


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (SHAREGPT, {"conversations": []}, "conversations: expected a list of turns .*got list \\[\\]"),
        (SHAREGPT, {"conversations": [said("alien", "q")]}, r"conversations\[0\]\.from: expected one of .*'alien'"),
        (SHAREGPT, {"conversations": [{"from": "human"}]}, r"conversations\[0\]: .*got the keys \['from'\]"),
        (SHAREGPT, {"chosen": None}, "chosen: expected a list of turns .*got null"),
        (SHAREGPT, {"rejected": said("gpt", None)}, r"rejected\.value: expected text, got null"),
        (SHAREGPT, {"rejected": said("human", "b")}, "rejected: .* begins with the assistant's turn, got role 'user'"),
        (SHAREGPT, {"chosen": said("gpt", "")}, "chosen: expected an answer with text"),
        (SHAREGPT, {"system": 7}, "system: expected text, got int 7"),
        (SHAREGPT, {"chosen": said("function_call", "add 2")}, r"chosen\.value: expected a list or its JSON"),
        (SHAREGPT, {"chosen": said("tool_call", '{"arguments": {}}')}, r"chosen\.value: .*keys name and arguments"),
        (OPENAI, {"input": None}, "input: expected an object with messages, got null"),
        (OPENAI, {"input": {}}, r"input\.messages: expected a list of messages, got null"),
        (OPENAI, {"preferred_output": []}, "preferred_output: expected a list of messages"),
        (OPENAI, {"non_preferred_output": [ASKED]}, "non_preferred_output: .* got role 'user'"),
        (OPENAI, {"input": {"messages": [ASKED], "tools": "{"}}, "tools: expected a list or its JSON"),
        (QUESTION, {"question": None}, "question: expected text, got null"),
        (QUESTION, {"rejected": 5}, "rejected: expected text, got int 5"),
        (QUESTION, {"chosen": ""}, "chosen: expected an answer with text"),
        (QUESTION, {"history": [["q"]]}, r"history\[0\]: expected \[question, answer\]"),
        (HH, {"chosen": "Hello"}, "chosen: expected a transcript that begins with 'Human:'"),
        (HH, {"rejected": "\n\nHuman: other\n\nAssistant: b"}, "chosen: .* no turn in common"),
        (HH, {"rejected": "\n\nHuman: q\n\nHuman: b"}, "rejected: .* got role 'user'"),
        (WHOLE, {"chosen": "4"}, "chosen: expected to begin with the same text as rejected, .* got str '4' and str '2"),
        (WHOLE, {"rejected": None}, "rejected: expected text, got null"),
        (
            MESSAGES,
            {"prompt": [turn("user", [{"type": "image_url", "image_url": "x"}])]},
            r"prompt\[0\]\.content\[0\]: expected a part of type text, got type 'image_url'",
        ),
        (
            MESSAGES,
            {"chosen": [turn("assistant", None, tool_calls=["add"])]},
            r"chosen\[0\]\.tool_calls: expected a li",
        ),
        (MESSAGES, {"chosen": [turn("assistant", "\ud83d")]}, "chosen: expected Unicode text, got half of a surrogate"),
        (MESSAGES, {"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object, got list"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, {"chosen_ids": [2**40]}, "chosen_ids: .*32 bits"),
        (
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
            {"chosen_ids": [True]},
            "chosen_ids: .* integer tok",
        ),
    ],
)
def test_bad_record_is_kept_with_its_line_and_reason(tmp_path, good, change, message):
    path = write(tmp_path / "pairs.jsonl", good, {**good, **change}, good)
    first, bad, last = read_pairs(path)
    assert first["problem"] is None
    assert last["problem"] is None
    assert bad["place"] == f"{path}, line 2"
    assert bad["pair"] is None
    assert re.match(message, bad["problem"]), bad["problem"]


def test_tool_arguments_arrive_as_written(tmp_path):
    """Arrow merges the keys of all records; what JSON says stays as it is, and null keys do not reach a template."""
    calls = [[{"function": {"name": "f", "arguments": arguments}}] for arguments in ({"a": 1}, {"b": "x"})]
    records = [{**MESSAGES, "chosen": [turn("assistant", "", tool_calls=call)]} for call in calls]
    for rows in (
        read_pairs(write(tmp_path / "pairs.jsonl", *records)),
        convert_pairs(Dataset.from_list(records)),
    ):
        assert [pair.chosen[0]["tool_calls"] for pair in pairs_of(rows)] == calls


def test_unknown_columns_name_the_file_and_the_forms(tmp_path):
    path = write(tmp_path / "pairs.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(ValueError, match="columns: expected prompt, chosen and rejected") as raised:
        read_pairs(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "ShareGPT" in str(raised.value)
    assert "prompt and chosen and rejected are missing" in str(raised.value)
    with pytest.raises(ValueError, match="rejected is missing: rename the columns"):
        read_pairs(write(path, {"prompt": "a", "chosen": "b"}))
    with pytest.raises(ValueError, match=r"got \['prompt', 'completion'\]"):  # a form for supervised fine-tuning alone
        read_pairs(write(path, {"prompt": "a", "completion": "b"}))


def test_kinds_are_told():
    assert check_pairs(Dataset.from_list([SHAREGPT])) == "messages"
    assert check_pairs(Dataset.from_list([HH])) == "messages"


def test_registry_names_every_column_that_a_converter_reads():
    """A record less all other columns gives the same pair."""
    (block,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for line, form in zip(block.splitlines(), FORMS, strict=False):
        record = {**json.loads(line), "tools": [{"name": "f"}]}
        whole = form.convert({**record, "other": 1})
        assert form.convert({column: value for column, value in record.items() if column in form.columns}) == whole


@pytest.mark.parametrize("absent", ["question", "chosen", "rejected"])
def test_record_without_a_field_of_its_form_is_named_and_skipped(tmp_path, absent):
    """Also where the form takes one of several fields: the load goes on, and the record is a bad one."""
    good = {"question": "2 + 2?", "chosen": "4", "rejected": "5"}
    path = write(tmp_path / "pairs.jsonl", good, {name: text for name, text in good.items() if name != absent}, good)
    rows = read_pairs(path)
    assert rows["problem"][1] == f"{absent}: expected text, got null. Fill the field or remove the record."
    assert bad_places(rows) == [f"{path}, line 2"]
    assert bad_places(convert_pairs(Dataset.from_list([good, {**good, absent: None}]))) == ["record 1"]


def bad_places(rows):
    return [row["place"] for row in rows if row["problem"]]
