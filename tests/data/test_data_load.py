"""Pairs are loaded from every kind of source, and what is wrong with them is said by file, line, record and field."""

import json

import datasets
import datasets.config
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError
from dpop_trainer.data import check_pairs, load, load_pairs
from dpop_trainer.data.records import read_messages_pair

PAIRS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    {"prompt": "3 + 3 =", "chosen": " 6", "rejected": " 7"},
]
USER = {"role": "user", "content": "2 + 2 ="}
RIGHT = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, *lines: str | bytes):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def test_json_lines(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", *map(json.dumps, PAIRS))
    assert load_pairs(path).to_list() == PAIRS
    assert load_pairs(str(path), split="validation").to_list() == PAIRS


def test_json_lines_with_byte_order_mark_and_blank_lines(tmp_path):
    path = write_lines(
        tmp_path / "pairs.jsonl", b"\xef\xbb\xbf" + json.dumps(PAIRS[0]).encode(), "", json.dumps(PAIRS[1])
    )
    assert load_pairs(path).to_list() == PAIRS


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    pair = {"prompt": "When?", "chosen": "2024-02-29", "rejected": "2023-02-28T00:00:00"}
    path = write_lines(tmp_path / "pairs.jsonl", json.dumps(pair))
    assert load_pairs(path).to_list() == [pair]


def test_fields_that_only_later_records_have(tmp_path):
    with_tool = {"role": "assistant", "content": "4", "name": "adder"}
    lines = [{"chosen": [USER, RIGHT]}, {"chosen": [USER, with_tool], "note": "late"}]
    loaded = load_pairs(write_lines(tmp_path / "pairs.jsonl", *map(json.dumps, lines)))
    assert loaded["note"][:] == [None, "late"]
    assert loaded[1]["chosen"][1]["name"] == "adder"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param(["{}", "", '{"prompt": '], r"pairs\.jsonl, line 3: expected a JSON object", id="cut off"),
        pytest.param(["{}", '["prompt"]'], r"line 2: expected a JSON object with the fields of a record", id="a list"),
        pytest.param(["{}", "null"], r"line 2: .* got 'null'", id="null"),
        pytest.param([b'{"prompt": "\xff"}'], r"line 1: expected a JSON object.*utf-8", id="not UTF-8"),
        pytest.param(['{"id": 1}', '{"id": 2}', '{"id": "3"}', '{"id": 4}'], r"line 3: id: .* same type", id="types"),
        pytest.param(
            ['{"chosen": [{"content": "a"}]}', "", '{"chosen": [{"content": ["b"]}]}'],
            "line 3: chosen: .* same type",
            id="types of parts",
        ),
        pytest.param(['{"prompt": "\\ud800"}'], "line 1: prompt: ", id="half a surrogate pair"),
        pytest.param([""], "expected at least one pair, got none", id="empty"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(write_lines(tmp_path / "pairs.jsonl", *lines))


def test_json_file_is_a_list_or_lines(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(PAIRS, indent=1))
    assert load_pairs(tmp_path / "list.json").to_list() == PAIRS
    assert load_pairs(write_lines(tmp_path / "lines.json", *map(json.dumps, PAIRS))).to_list() == PAIRS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param('[{"prompt": "a"},\n {"prompt"}]', "expected a JSON list of records.*line 2", id="does not parse"),
        pytest.param('[{"prompt": "a"}, "b"]', "record 1: expected a JSON object", id="text"),
        pytest.param("[]", "expected at least one pair", id="empty"),
    ],
)
def test_bad_json_list_is_named(tmp_path, content, message):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(tmp_path / "pairs.json")


def test_json_is_parsed_once_per_content(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "pairs.jsonl", json.dumps(PAIRS[0]))
    first = load_pairs(path)
    with monkeypatch.context() as patch:
        patch.setattr(load, "all_records", None)  # a call would raise
        again = load_pairs(write_lines(tmp_path / "copy.jsonl", json.dumps(PAIRS[0])))
    # equal fingerprints let `Dataset.map` find its cached results again
    assert (again.to_list(), again._fingerprint) == (first.to_list(), first._fingerprint)
    assert load_pairs(write_lines(path, json.dumps(PAIRS[1]))).to_list() == PAIRS[1:]


def test_parquet_and_arrow(tmp_path):
    dataset = Dataset.from_list(PAIRS)
    dataset.to_parquet(tmp_path / "pairs.parquet")
    assert load_pairs(tmp_path / "pairs.parquet").to_list() == PAIRS
    dataset.save_to_disk(tmp_path / "folder")
    (arrow,) = (tmp_path / "folder").glob("*.arrow")
    assert load_pairs(arrow).to_list() == PAIRS


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.arrow"])
def test_unreadable_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"neither parquet nor arrow")
    with pytest.raises(ValueError, match=r"expected a readable \.(parquet|arrow) file"):
        load_pairs(tmp_path / name)


def test_folders(tmp_path):
    both = DatasetDict(train=Dataset.from_list(PAIRS), test=Dataset.from_list(PAIRS[1:]))
    both.save_to_disk(tmp_path / "saved")
    assert load_pairs(tmp_path / "saved", split="test").to_list() == PAIRS[1:]
    (tmp_path / "files").mkdir()
    write_lines(tmp_path / "files" / "test.jsonl", *map(json.dumps, PAIRS))
    assert load_pairs(tmp_path / "files", split="test").to_list() == PAIRS


def test_data_sets_in_memory():
    dataset = Dataset.from_list(PAIRS)
    assert load_pairs(dataset) is dataset
    assert load_pairs(DatasetDict(test=dataset), split="test") is dataset
    with pytest.raises(ValueError, match=r"split: expected one of \['test'\].*got 'train'"):
        load_pairs(DatasetDict(test=dataset))
    with pytest.raises(ValueError, match=r"got IterableDataset\. Load a streamed data set without streaming"):
        load_pairs(dataset.to_iterable_dataset())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one pair, got none"):
        load_pairs(dataset.select([]))


def test_missing_and_unknown_files(tmp_path):
    for missing in (tmp_path / "pairs", "pairs.jsonl", "./pairs", "data/of/pairs"):
        with pytest.raises(FileNotFoundError, match="source: expected an existing file or folder"):
            load_pairs(missing)
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected")
    with pytest.raises(ValueError, match=r"expected a file ending in \.jsonl, .*pairs\.csv"):
        load_pairs(tmp_path / "pairs.csv")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"source: expected a folder of data files .*Name one file of it"):
        load_pairs(tmp_path / "model")


def test_slices_of_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"split: expected a plain name for a file, got 'train\[:1\]'"):
        load_pairs(write_lines(tmp_path / "pairs.jsonl", *map(json.dumps, PAIRS)), split="train[:1]")


def test_hub(monkeypatch):
    calls = []

    def hub(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "nobody/nothing":
            raise DatasetNotFoundError("it is not there")
        return Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_pairs("trl-lib/pairs", "test", name="easy", revision="v1").to_list() == PAIRS
    assert calls == [(("trl-lib/pairs", "easy"), {"split": "test", "revision": "v1"})]
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing'.*it is not there"):
        load_pairs("nobody/nothing")


@pytest.mark.parametrize(
    ("pair", "form"),
    [
        pytest.param(PAIRS[0], "text", id="text"),
        pytest.param({**PAIRS[0], "prompt": ""}, "text", id="empty prompt text"),
        pytest.param({"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}, "messages", id="messages"),
        pytest.param({"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "messages", id="implicit prompt"),
        pytest.param(
            {"prompt": "2 + 2 =", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "messages", id="repeated as text"
        ),
        pytest.param({"chosen": [USER, RIGHT], "rejected": [USER, RIGHT]}, "messages", id="identical messages"),
        pytest.param({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}, "tokens", id="tokens"),
        pytest.param({**PAIRS[0], "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "tokens", id="both"),
        pytest.param({**PAIRS[0], "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}, "text", id="reference"),
    ],
)
def test_usable_records(pair, form):
    assert check_pairs(Dataset.from_list([pair])) == form


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        pytest.param({**PAIRS[0], "prompt": None}, "record 1: prompt: expected text, got null", id="null"),
        pytest.param({**PAIRS[0], "chosen": ""}, "record 1: chosen: expected an answer", id="empty answer"),
        pytest.param(
            {"prompt": [USER], "chosen": [], "rejected": [WRONG]}, "chosen: .* list of messages", id="no turn"
        ),
        pytest.param(
            {"prompt": [], "chosen": [RIGHT], "rejected": [WRONG]}, "prompt: .* list of messages", id="no prompt turn"
        ),
        pytest.param({"chosen": [RIGHT], "rejected": [WRONG]}, "chosen: .* no turn in common", id="nothing shared"),
        pytest.param(
            {"prompt": "7 + 7 =", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
            "prompt: expected a list of messages as chosen has, got str '7 [+] 7 ='",
            id="another prompt as text",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
            "chosen: expected an answer that begins with the assistant's turn, got role 'user'",
            id="prompt twice",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [{**RIGHT, "content": ""}], "rejected": [WRONG]},
            "chosen: expected an answer with text",
            id="empty message",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [RIGHT], "rejected": [{**WRONG, "content": None}]},
            r"rejected\[0\]\.content: expected text, got null",
            id="null content",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [{**RIGHT, "role": ""}], "rejected": [WRONG]},
            r"chosen\[0\]\.role: expected text",
            id="no role",
        ),
        pytest.param(
            {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG], "tools": "{"},
            "tools: expected a list",
            id="tools",
        ),
        pytest.param(
            {**PAIRS[0], "ref_chosen_logps": float("nan"), "ref_rejected_logps": -1.0},
            "ref_chosen_logps: expected a finite number, got float nan",
            id="reference is NaN",
        ),
        pytest.param(
            {**PAIRS[0], "ref_chosen_logps": -1.0, "ref_rejected_logps": None},
            "ref_rejected_logps: expected a finite number, got null",
            id="no reference",
        ),
        pytest.param(
            {"prompt_ids": [1], "chosen_ids": None, "rejected_ids": [2]}, "chosen_ids: .* got null", id="null tokens"
        ),
    ],
)
def test_unusable_record_is_named(pair, message):
    good = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "prompt_ids": [1],
        "chosen_ids": [2],
        "rejected_ids": [3],
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
        "tools": "[]",
    }
    if isinstance(pair.get("rejected"), list):
        prompt = [USER] if isinstance(pair.get("prompt"), list) else "2 + 2 ="
        turns = [] if isinstance(prompt, list) else [USER]
        good |= {"prompt": prompt, "chosen": [*turns, RIGHT], "rejected": [*turns, WRONG]}
    first = {field: good[field] for field in pair}
    with pytest.raises(ValueError, match=message) as raised:
        check_pairs(Dataset.from_list([first, pair]))
    assert "got 1 that are not:\n  record 1: " in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"prompt": ["a"], "chosen": ["b"]}, r"columns: .* got \['prompt', 'chosen'\]", id="missing"),
        pytest.param(
            {"chosen": [1], "rejected": [2]},
            "columns: expected chosen and rejected as texts",
            id="neither text nor messages",
        ),
        pytest.param(
            {"prompt": ["a"], "chosen": ["b"], "rejected": [[RIGHT]]}, r"rejected: expected text, got list", id="mixed"
        ),
        pytest.param(
            {"prompt": ["a"], "chosen": [[RIGHT]], "rejected": ["c"]},
            "rejected: expected a list of mess",
            id="mixed too",
        ),
        pytest.param(
            {"prompt": ["a"], "chosen": [RIGHT], "rejected": [WRONG]}, "Put the message into a list", id="dict"
        ),
        pytest.param(
            {"prompt": ["a"], "chosen": [[{"from": "gpt", "value": "4"}]], "rejected": [[WRONG]]},
            r"chosen\[0\]: .* the keys role and content, got the keys \['from', 'value'\]",
            id="ShareGPT",
        ),
        pytest.param(
            {"prompt_ids": [["1"]], "chosen_ids": [["2"]], "rejected_ids": [["3"]]},
            "prompt_ids: expected lists of integer token ids",
            id="tokens as text",
        ),
        pytest.param(
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "prompt_ids: .* lists", id="no lists"
        ),
        pytest.param(
            {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "ref_chosen_logps": [-1.0]},
            "ref_rejected_logps: expected a column beside ref_chosen_logps",
            id="half a reference",
        ),
    ],
)
def test_unusable_columns_are_named(columns, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(Dataset.from_dict(columns))


def test_five_bad_records_are_spelt_out_and_all_counted():
    records = [PAIRS[0] if index % 2 else {**PAIRS[0], "chosen": ""} for index in range(16)]
    with pytest.raises(ValueError, match="expected 16 usable records, got 8 that are not") as raised:
        check_pairs(Dataset.from_list(records))
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines[:5]] == [f"record {index}" for index in (0, 2, 4, 6, 8)]
    assert lines[5:] == ["  and 3 more"]


def test_null_keys_that_arrow_adds_are_not_passed_on():
    messages = [USER, {**RIGHT, "name": None}]
    pair = read_messages_pair({"chosen": messages, "rejected": [USER, {**WRONG, "name": "adder"}]})
    assert pair.prompt == [USER]
    assert pair.chosen == [RIGHT]
    assert pair.rejected == [{**WRONG, "name": "adder"}]
