"""Every form of pairs is recognised by its columns and read as it was written, and bad records of each are named."""

import gzip
import importlib
import json
import logging
import re
import sys
from pathlib import Path

import datasets.config
import pytest
from datasets import Dataset
from dpop_trainer.data import check_pairs, forms, read_pairs, tokenise_pairs
from dpop_trainer.data.convert import ROW_FEATURES, convert_pairs, row_pair
from dpop_trainer.data.forms import FORMS, FORMS_BY_NAME, recognise_form
from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.data.records import MessagesPair, TextPair
from tiny import word_tokenizer

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


TEXT = TextPair("2 + 2?", "4", "5")
# what the example of each form in docs/data.md becomes
EXAMPLES = {
    "token ids": PairIds([1, 42, 17], [5, 2], [6, 2]),
    "OpenAI preference (input, preferred_output, non_preferred_output)": PAIR,
    "ShareGPT (conversations, chosen, rejected)": PAIR,
    "ShareGPT conversations (chosen, rejected)": PAIR,
    "messages": PAIR,
    "messages as JSON": PAIR,
    "question and answers": PAIR,
    "two answers and a label": PAIR,
    "answers with scores": PAIR,
    "transcripts (Human, Assistant)": PAIR,
    "text": TEXT,
    "text that begins with its prompt": TextPair("2 + 2?", " 4", " 5"),
    "prompt and completion": TextPair("2 + 2?", "4", "4"),
}


def documented_examples():
    """The records that docs/data.md shows, by the name of the form as which each is recognised."""
    (block,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    records = [json.loads(line) for line in block.splitlines()]
    return {recognise_form(record, completions="completion" in record).name: record for record in records}


def example_of(name):
    examples = documented_examples()
    assert name in examples, f"{name}: add an example to docs/data.md, and what it becomes to EXAMPLES"
    return examples[name]


def test_every_form_has_its_row_and_its_example_in_the_docs():
    """In the registry's order, which is the one in which they are looked for."""
    names = list(FORMS_BY_NAME)
    table = DOCS.read_text().partition("One example of each")[0]
    _, *rows = re.findall(r"^\| ([\w ]+?) \|", table, re.MULTILINE)
    assert rows == [name.partition(" (")[0] for name in names], "docs/data.md: one row for each of `FORMS`, in order"
    assert list(documented_examples()) == names, "docs/data.md: one example for each of `FORMS`, in order"
    assert list(EXAMPLES) == names, "EXAMPLES: what the example of each of `FORMS` becomes"


@pytest.mark.parametrize("name", FORMS_BY_NAME)
def test_documented_examples(name, tmp_path, caplog):
    record = example_of(name)
    completions = "completion" in record
    path = write(tmp_path / "pairs.jsonl", record)
    (row,) = read_pairs(path, completions=completions)
    assert caplog.messages == [f"{path}: form: {name}"]
    assert row_pair(row["kind"], row["pair"]) == EXAMPLES[name]
    assert pairs_of(convert_pairs(Dataset.from_list([record]), completions=completions)) == [EXAMPLES[name]]
    assert row["score_gap"] == (7.0 if "score_chosen" in record else None)


@pytest.mark.parametrize("name", FORMS_BY_NAME)
def test_a_form_names_every_column_that_it_reads_and_no_other(name):
    """A record less all other columns gives the same pair; an error tells a field that the data set has."""
    form, example = FORMS_BY_NAME[name], example_of(name)
    record = {**example, "tools": [{"name": "f"}]}
    whole = form.convert({**record, "other": 1})
    assert form.convert({column: value for column, value in record.items() if column in form.columns}) == whole
    read = [column for column in example if column in form.columns]
    for wrong in (None, 7, "", [], {}):
        for column in read:
            try:
                form.convert({**example, column: wrong})
            except ValueError as error:
                field = re.split(r"[:.\[]", str(error))[0]
                assert field in read, f"{name}: {column} is {wrong!r}, and the error names {field}"


# a form as a file of someone's own
OWN_FORM = """
from dpop_trainer.data.forms import Form
from dpop_trainer.data.messages import described
from dpop_trainer.data.records import TextPair

COLUMNS = ("task", "good", "bad")

def convert(record):
    for field in COLUMNS:
        if not isinstance(record.get(field), str):
            raise ValueError(f"{field}: expected text, got {described(record.get(field))}. Remove the record.")
    return TextPair(*(record[field] for field in COLUMNS))

FORM = Form("good and bad", COLUMNS, lambda sample: set(COLUMNS) <= set(sample), convert)
"""


def test_a_form_of_ones_own_is_read_as_any_other(tmp_path, monkeypatch, caplog):
    """From files and from memory; also its bad records, and what is said of columns that no form has."""
    (tmp_path / "own_form.py").write_text(OWN_FORM)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("own_form").FORM
    monkeypatch.setattr(forms, "FORMS", (own, *FORMS))
    monkeypatch.setitem(FORMS_BY_NAME, own.name, own)
    monkeypatch.delitem(sys.modules, "own_form")
    record = {"task": "2 + 2?", "good": "4", "bad": "5"}
    assert both_ways(tmp_path, record) == (TEXT, TEXT)
    assert caplog.messages == [f"{tmp_path / 'pairs.jsonl'}: form: good and bad", "Pairs: form: good and bad"]
    rows = convert_pairs(Dataset.from_list([record, {**record, "good": None}]))
    assert rows["problem"] == [None, "good: expected text, got null. Remove the record."]
    with pytest.raises(ValueError, match=r"another form \(good and bad, token ids, "):
        recognise_form({"question": "q"})


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
TWO = {"input": "q", "output_1": "a", "output_2": "b", "label": 1}
SCORED = {"instruction": "q", "completions": ["a", "b"], "scores": [2, 1]}
RATED = {"instruction": "q", "completions": [{"response": "a", "score": 2}, {"response": "b", "score": 1}]}
TOKENS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
MESSAGES = {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]}
WHOLE_TURNS = {
    "chosen": [said("human", "q"), said("gpt", "a")],
    "rejected": [said("human", "q"), said("gpt", "b")],
}
JSON_MESSAGES = {"prompt": json.dumps([ASKED]), "chosen": json.dumps([RIGHT]), "rejected": json.dumps([WRONG])}
COMPLETION = {"prompt": "q", "completion": "a"}
COMPLETED = {"prompt": [ASKED], "completion": [RIGHT]}


BAD_RECORDS = [
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
    (TWO, {"label": 0}, r"label: expected 1 \(output_1 is better\), 2 \(output_2\) or 'tie' \(neither\), got int 0"),
    (TWO, {"label": True}, "label: expected 1 .* got bool True"),
    (TWO, {"label": None}, "label: expected 1 .* got null"),
    (TWO, {"output_2": None}, "output_2: expected text, got null"),
    (TWO, {"input": None}, "input: expected text, got null"),
    (SCORED, {"completions": ["a"]}, "completions: expected a list of two answers or more"),
    (SCORED, {"completions": ["a", None]}, r"completions\[1\]: expected an answer as text, got null"),
    (SCORED, {"scores": [1]}, "scores: expected a score for each answer, got null"),
    (RATED, {"completions": [*RATED["completions"], {"response": "c"}]}, r"completions\[2\]: expected a score .*null"),
    (RATED, {"completions": [*RATED["completions"], {"score": 3}]}, r"completions\[2\]: expected an answer as text"),
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
    (WHOLE_TURNS, {"rejected": [said("human", "q"), said("gpt", "")]}, "rejected: expected an answer with text"),
    (JSON_MESSAGES, {"rejected": "[{"}, r"rejected: expected the JSON of a list of messages, got str '\[{'"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"rejected": ""}, "rejected: .* at least one character, got ''"),
    (COMPLETION, {"completion": ""}, "completion: expected an answer of at least one character, got ''"),
    (COMPLETION, {"completion": None}, "completion: expected text, got null. Fill"),
    (COMPLETION, {"prompt": [ASKED]}, "prompt: expected text, got list .* Give prompt and completion one form"),
    (COMPLETED, {"completion": []}, "completion: expected a list of messages"),
    (COMPLETED, {"completion": [ASKED]}, "completion: .* begins with the assistant's turn, got role 'user'"),
    (MESSAGES, {"chosen": [turn("assistant", "\ud83d")]}, "chosen: expected Unicode text, got half of a surrogate"),
    (MESSAGES, {"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object, got list"),
    ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, {"chosen_ids": [2**40]}, "chosen_ids: .*32 bits"),
    (
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
        {"chosen_ids": [True]},
        "chosen_ids: .* integer tok",
    ),
]


@pytest.mark.parametrize(("good", "change", "message"), BAD_RECORDS)
def test_bad_record_is_kept_with_its_line_and_reason(tmp_path, good, change, message):
    path = write(tmp_path / "pairs.jsonl", good, {**good, **change}, good)
    first, bad, last = read_pairs(path, completions="completion" in good)
    assert first["problem"] is None
    assert last["problem"] is None
    assert bad["place"] == f"{path}, line 2"
    assert bad["pair"] is None
    assert re.match(message, bad["problem"]), bad["problem"]


@pytest.mark.parametrize("name", FORMS_BY_NAME)
def test_every_form_has_bad_records(name):
    tried = {recognise_form(good, completions="completion" in good).name for good, _, _ in BAD_RECORDS}
    assert name in tried, f"{name}: add a record that it cannot use, and what is said of it, to BAD_RECORDS"


@pytest.mark.parametrize(
    ("record", "better", "worse"),
    [
        (TWO, "a", "b"),
        ({**TWO, "label": "2"}, "b", "a"),
        ({"input": "q", "response_1": "a", "response_2": "b", "label": 2}, "b", "a"),
        ({"prompt": "q", "response 1": "a", "response 2": "b", "label": 0}, "a", "b"),
        ({"prompt": "q", "response 1": "a", "response 2": "b", "label": 1}, "b", "a"),
        (SCORED, "a", "b"),
        ({**SCORED, "completions": ["a", "c", "b"], "scores": [2, 1.5, -1]}, "a", "b"),
        # overall_score calls the first the best by mistake, the mean of the aspects does not
        (
            {
                "instruction": "q",
                "completions": [
                    {"response": "b", "overall_score": 10.0, "fine-grained_score": 1.0},
                    {"response": "a", "overall_score": 7.0, "fine-grained_score": 4.25},
                ],
            },
            "a",
            "b",
        ),
    ],
)
def test_the_better_answer_is_the_chosen_one(tmp_path, record, better, worse):
    expected = MessagesPair(
        [turn("user", "q")], [turn("assistant", better)], [turn("assistant", worse)], {"tools": None}
    )
    assert set(map(repr, both_ways(tmp_path, record))) == {repr(expected)}


TIES = [
    ({"input": "w1", "output_1": "w2", "output_2": "w3", "label": "Tie"}, {"label": 1}),
    ({"prompt": "w1", "response 1": "w2", "response 2": "w3", "label": 2}, {"label": 1}),
    ({"instruction": "w1", "completions": ["w2", "w3"], "scores": [3, 3.0]}, {"scores": [3.0, 4.0]}),
]


@pytest.mark.parametrize(("tie", "change"), TIES)
def test_ties_are_counted_and_left_out(tmp_path, tie, change):
    """They are no bad records: a run goes on, and says how many there were."""
    rows = read_pairs(write(tmp_path / "pairs.jsonl", tie, {**tie, **change}, tie))
    assert (rows["kind"], rows["problem"]) == (["tie", "messages", "tie"], [None] * 3)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    tokenised, counts = tokenise_pairs(rows, tokenizer)
    assert (counts.num_pairs_in, counts.num_pairs, counts.dropped_tied, counts.skipped_bad) == (3, 1, 2, 0)
    assert tokenised["pair_id"][:] == [1]
    assert "1 of 3 pairs kept; dropped: 2 that are ties." in counts.summary()
    assert check_pairs(rows) == "messages"
    with pytest.raises(ValueError, match="pairs: expected one that prefers an answer, got 2 ties"):
        check_pairs(rows.select([0, 2]))


def test_transcripts_from_a_gzip_as_they_are_published(tmp_path):
    """Whole conversations; the answer that ends with nothing said is a bad record, and named."""
    before = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    records = [{"chosen": before + " because", "rejected": before + text} for text in (" no", "", " never\n\nreally")]
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    first, bad, last = read_pairs(path)
    assert bad["problem"] == "rejected: expected an answer with text, got an empty one. Remove the record."
    pair = row_pair(last["kind"], last["pair"])
    assert [message["content"] for message in pair.prompt] == ["hi", "hello", "why?"]
    assert (pair.chosen, pair.rejected) == ([turn("assistant", "because")], [turn("assistant", "never\n\nreally")])
    assert first["problem"] is None


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
    with pytest.raises(ValueError, match=r"got \['prompt', 'completion'\]. Train .* `dpop sft`, or with KTOTrainer"):
        read_pairs(write(path, {"prompt": "a", "completion": "b"}))


def test_kinds_are_told():
    assert check_pairs(Dataset.from_list([SHAREGPT])) == "messages"
    assert check_pairs(Dataset.from_list([HH])) == "messages"


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
