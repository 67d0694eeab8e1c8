"""Sources in, pairs out: the same bytes for the same seed, provenance, counts, and nothing half-written."""

import collections
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, SplitDict, SplitInfo
from dpop_trainer.cli import main
from dpop_trainer.data import load_pairs, tokenise_pairs
from dpop_trainer.data.write import PairWriter
from dpop_trainer.tools.pairs.build import build_file
from dpop_trainer.tools.pairs.edit import EditRule
from dpop_trainer.tools.pairs.metamath import NO_RESULT, MetaMath
from dpop_trainer.tools.pairs.recipes import RECIPES
from dpop_trainer.tools.pairs.source import license_of, open_source
from tiny import word_tokenizer

PLAIN = "She sold 48/2 = 24 clips.\nTogether 48+24 = 72 clips.\n#### 72"
RECORD = {"question": "How many clips?", "answer": PLAIN}


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build(source, out, **options):
    return build_file(options.pop("recipe", MetaMath()), str(source), out, show_progress=False, **options)


def questions(count: int) -> list[dict]:
    return [{**RECORD, "question": f"How many clips on day {i}?"} for i in range(count)]


def test_a_pair_says_where_it_is_from(tmp_path):
    (tmp_path / "LICENSE").write_text("\n   MIT License\n\nCopyright")
    source = write(tmp_path / "train.jsonl", [{"id": "a-7", **RECORD}])
    counts = build(source, tmp_path / "out" / "pairs.jsonl", seed=3)
    (pair,) = read(tmp_path / "out" / "pairs.jsonl")
    assert (counts.read, counts.built) == (1, 1)
    assert pair["prompt"] == "Question: How many clips?\nAnswer:"
    assert pair["chosen"] == f" {PLAIN}"
    # the space before the answer counts: " She sold 48/2 = 24"
    assert (pair["edit_start"], pair["edit_end"]) == (17, 19)
    assert pair["chosen"][17:19] == pair["edit_original"] == "24"
    assert pair["rejected"] == f" {PLAIN}".replace("= 24", f"= {pair['edit_replacement']}")
    assert {key: pair[key] for key in ("recipe", "seed", "source", "source_index", "source_id", "license")} == {
        "recipe": "metamath",
        "seed": 3,
        "source": "train.jsonl",
        "source_index": 0,
        "source_id": "a-7",
        "license": "MIT License",
    }
    assert (tmp_path / "out" / "pairs.jsonl.LICENSE").read_text() == "\n   MIT License\n\nCopyright"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pairs.jsonl", "pairs.jsonl.LICENSE"]


def test_as_messages(tmp_path):
    build(write(tmp_path / "a.jsonl", [RECORD]), tmp_path / "p.jsonl", form="messages")
    (pair,) = read(tmp_path / "p.jsonl")
    assert pair["prompt"] == [{"role": "user", "content": "How many clips?"}]
    assert pair["chosen"] == [{"role": "assistant", "content": PLAIN}]
    assert PLAIN[pair["edit_start"] : pair["edit_end"]] == pair["edit_original"] == "24"


def test_a_record_draws_alone(tmp_path):
    """Inserting, removing and reordering records leaves the others' pairs as they were."""
    records = questions(40)
    build(write(tmp_path / "a.jsonl", records), tmp_path / "a_pairs.jsonl", seed=5)
    changed = [records[7], {**RECORD, "question": "New?"}, *reversed(records[:7]), *records[8:30]]
    build(write(tmp_path / "b.jsonl", changed), tmp_path / "b_pairs.jsonl", seed=5)
    before = {pair["prompt"]: pair["rejected"] for pair in read(tmp_path / "a_pairs.jsonl")}
    after = {pair["prompt"]: pair["rejected"] for pair in read(tmp_path / "b_pairs.jsonl")}
    assert len(after) == 31
    assert {prompt: after[prompt] for prompt in after if prompt in before} == {
        prompt: before[prompt] for prompt in after if prompt in before
    }
    assert len(set(before.values())) > 1  # 17 ways to corrupt 24, 40 draws
    build(tmp_path / "a.jsonl", tmp_path / "again.jsonl", seed=5)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "a_pairs.jsonl").read_bytes()
    build(tmp_path / "a.jsonl", tmp_path / "other.jsonl", seed=6)
    assert [pair["rejected"] for pair in read(tmp_path / "other.jsonl")] != list(before.values())


def test_every_kind_of_source_gives_the_same_pairs(tmp_path):
    records = [RECORD, {**RECORD, "question": "Wie viele\u2028für 5 €? 👩‍👩‍👧 ‏שלום"}]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n")  # byte order mark, blank line
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    Dataset.from_list(records).save_to_disk(tmp_path / "e")
    written = []
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet", "e"):
        assert build(tmp_path / name, tmp_path / "out.jsonl").built == 2
        written.append([{**pair, "source": None} for pair in read(tmp_path / "out.jsonl")])
    assert written[1:] == written[:1] * 4
    assert written[0][1]["prompt"] == f"Question: {records[1]['question']}\nAnswer:"


def test_parquet_holds_what_jsonl_holds(tmp_path):
    source = write(tmp_path / "a.jsonl", questions(2500))  # two full row groups and a rest
    for form in ("text", "messages"):
        build(source, tmp_path / "p.jsonl", form=form)
        build(source, tmp_path / "p.parquet", form=form)
        assert pq.read_table(tmp_path / "p.parquet").to_pylist() == read(tmp_path / "p.jsonl")


def test_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, streaming))
        dataset = Dataset.from_list(questions(3)).to_iterable_dataset()
        dataset.info.license, dataset.info.splits = "MIT", SplitDict({split: SplitInfo(split, num_examples=3)})
        return dataset

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    counts = build("openai/gsm8k", tmp_path / "p.jsonl", config="main", split="test", limit=2)
    assert asked == [("openai/gsm8k", "main", "test", True)]
    assert (counts.read, counts.built) == (2, 2)
    assert {(pair["source"], pair["license"]) for pair in read(tmp_path / "p.jsonl")} == {("openai/gsm8k", "MIT")}
    assert open_source("openai/gsm8k").size == 3


def test_counts_and_limit(tmp_path):
    source = write(tmp_path / "a.jsonl", [RECORD, {**RECORD, "answer": "#### 5"}, RECORD])
    counts = build(source, tmp_path / "p.jsonl")
    assert (counts.read, counts.built, counts.skipped) == (3, 2, {NO_RESULT: 1})
    assert str(counts) == f"2 pairs built; 1 skipped: {NO_RESULT}"
    counts = build(source, tmp_path / "p.jsonl", limit=2)  # of records read, not of pairs built
    assert (counts.read, counts.built, counts.skipped) == (2, 1, {NO_RESULT: 1})


def test_protected_places_are_counted(tmp_path):
    answers = ["[asy] 1 [/asy] 2", "[asy] 1 [/asy] 2 on 2024-03-15", "[asy] 1 [/asy]"]
    source = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": answer} for answer in answers])
    assert str(build(source, tmp_path / "p.jsonl", recipe=EditRule())) == (
        "2 pairs built; 1 skipped: nothing in the answer that the rule 'number' could change but in drawing code; "
        "dates left as they are in 1 pair; drawing code left as they are in 2 pairs"
    )


BAD_LINES = [
    (b"{'question'", r"a\.jsonl, line 2: expected a JSON object, got .*Expecting property name"),
    (b"[1]", r"a\.jsonl, line 2: expected a JSON object with the fields of a record, got '\[1\]'"),
    (b'{"question": "\xff"}', r"a\.jsonl, line 2: expected a JSON object, got .*can't decode byte"),
    (b'{"question": "q"}', r"a\.jsonl, line 2: answer: expected a non-empty string, got the fields \['question'\]"),
    (b'{"question": "q", "answer": 12}', r"a\.jsonl, line 2: answer: expected a non-empty string, got 12"),
    (b'{"question": "\\u0000 ", "answer": ""}', r"a\.jsonl, line 2: answer: expected a non-empty string, got ''"),
    (b"[" * 100_000, r"a\.jsonl, line 2: expected a JSON object, got "),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_record_is_named_or_counted(tmp_path, line, message):
    source = tmp_path / "a.jsonl"
    source.write_bytes(json.dumps(RECORD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        build(source, tmp_path / "p.jsonl")
    assert list(tmp_path.iterdir()) == [source]
    counts = build(source, tmp_path / "p.jsonl", on_bad_record="skip")
    assert (counts.read, counts.built, counts.bad) == (2, 1, 1)
    assert counts.first_bad == [str(caught.value)]
    assert str(counts) == "1 pair built; 1 bad record skipped"


def test_nothing_to_build_is_an_error(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("\n")
    with pytest.raises(ValueError, match="expected records that pairs can be made of, got none: 0 read"):
        build(source, tmp_path / "p.jsonl")
    source.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"got none: 1 read.*1 bad record skipped.\n  .*line 1"):
        build(source, tmp_path / "p.jsonl", on_bad_record="skip")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit: expected a number >= 1 or None, got 0"),
        ({"form": "xml"}, "form: expected 'text' or 'messages', got 'xml'"),
        ({"on_bad_record": "drop"}, "on_bad_record: expected 'error' or 'skip', got 'drop'"),
        ({"out": "p.csv"}, "out: expected a file ending in .jsonl or .parquet, got p.csv"),
        ({"source": "a.csv"}, "source: expected a file ending in"),
    ],
)
def test_arguments_are_checked(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    write(tmp_path / "a.jsonl", [RECORD])
    with pytest.raises(ValueError, match=message):
        build(options.pop("source", "a.jsonl"), options.pop("out", "p.jsonl"), **options)
    with pytest.raises(FileNotFoundError, match=r"source: expected an existing file or folder, got nowhere\.jsonl"):
        build("nowhere.jsonl", "p.jsonl")


def test_broken_files_are_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(questions(3)), tmp_path / "whole.parquet", compression="none")
    middle = (tmp_path / "whole.parquet").read_bytes().replace(b"How many clips on day 1?", b"\xff" * 24)
    contents = {"a.parquet": b"PAR1", "b.parquet": middle, "a.jsonl.gz": b"\x1f\x8b junk", "a.json": b'[{"a": '}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            list(open_source(str(tmp_path / name)))


def test_how_much_of_a_source_is_read(tmp_path):
    """In bytes of the file, also where it is compressed; in records where Parquet says how many there are."""
    noise = random.Random(0)
    lines = "".join(json.dumps({"text": noise.randbytes(5000).hex()}) + "\n" for _ in range(100))  # 500 KB of news
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        source = open_source(str(tmp_path / name))
        assert source.size == (tmp_path / name).stat().st_size
        seen = [source.consumed for _ in source]
        assert seen == sorted(seen)
        assert 0 < seen[0] < source.size / 2
        assert seen[-1] == source.size
    pq.write_table(pa.Table.from_pylist(questions(3)), tmp_path / "c.parquet")
    source = open_source(str(tmp_path / "c.parquet"))
    assert (source.size, [source.consumed for _ in source]) == (3, [1, 2, 3])


def test_licence_beside_the_source(tmp_path):
    (tmp_path / "LICENSE.prefs").write_text("# Apache License\n   Version 2.0, January 2004\n")
    assert license_of(tmp_path / "other.jsonl") is None
    found = license_of(tmp_path / "prefs.jsonl")
    assert found is not None
    assert found[0] == "Apache License, Version 2.0, January 2004"
    source = write(tmp_path / "prefs.jsonl", [RECORD])
    build(source, tmp_path / "p.jsonl", license="CC-BY-4.0")
    assert read(tmp_path / "p.jsonl")[0]["license"] == "CC-BY-4.0"
    assert not (tmp_path / "p.jsonl.LICENSE").exists()


def test_half_a_surrogate_pair_is_a_bad_record(tmp_path):
    record = {"prompt": "Q", "chosen": "a \ud83d 7"}
    source = write(tmp_path / "a.jsonl", [record, {**record, "chosen": "a 7"}])
    for name in ("p.jsonl", "p.parquet"):
        with pytest.raises(ValueError, match="line 1: chosen: expected Unicode text, got half of a surrogate pair"):
            build(source, tmp_path / name, recipe=EditRule())
        assert build(source, tmp_path / name, recipe=EditRule(), on_bad_record="skip").built == 1


def test_the_writer_leaves_nothing_behind_when_it_is_left_by_an_error(tmp_path):
    for name in ("p.jsonl", "p.parquet"):
        (tmp_path / name).write_text("old")
        with pytest.raises(ZeroDivisionError), PairWriter(tmp_path / name) as writer:
            collections.deque((writer.write({"prompt": 1 // (1499 - i)}) for i in range(1500)), maxlen=0)
        assert (tmp_path / name).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.parquet"]


def test_every_recipe_from_the_command_line(tmp_path, capsys):
    write(tmp_path / "metamath.jsonl", [RECORD])
    choices = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
    write(tmp_path / "arc.jsonl", [{"question": "Which?", "choices": choices, "answerKey": "C"}])
    write(tmp_path / "hellaswag.jsonl", [{"query": "They", "choices": ["go.", "stay."], "gold": 1}])
    write(tmp_path / "edit.jsonl", [{"question": "Is it?", "chosen": " It is open."}])
    write(tmp_path / "from-samples.jsonl", [{"question": "How many clips?", "samples": ["#### 5", "#### 72"]}])
    extra = {
        "edit": ["--rule", "word", "--prompt_field", "question"],
        "from-samples": ["--labels", str(tmp_path / "metamath.jsonl")],
    }
    expected = {
        "arc": [(" c", " a"), (" c", " b")],
        "hellaswag": [(" stay.", " go.")],
        "from-samples": [(f" {PLAIN}", " #### 5")],
    }
    for name in RECIPES:
        out = tmp_path / f"{name}_pairs.jsonl"
        argv = ["pairs", "build", name, "--source", str(tmp_path / f"{name}.jsonl"), "--out", str(out)]
        assert main([*argv, *extra.get(name, [])]) == 0
        assert " built" in capsys.readouterr().out
        pairs = [(pair["chosen"], pair["rejected"]) for pair in read(out)]
        assert pairs == expected.get(name, pairs)
        tokenise_pairs(load_pairs(out), word_tokenizer(), keep_identical=True)  # what is built can be trained on
    (pair,) = read(tmp_path / "edit_pairs.jsonl")
    assert (pair["prompt"], pair["chosen"]) == ("Is it?", " It is open.")
    assert pair["rejected"] in (" It isn't open.", " It is close.")
