"""Files of pairs that are very small, very large in one record, all alike or broken in the middle."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from dpop_trainer.cli import main
from dpop_trainer.tools.doctor.examine import examine_pairs
from tiny import word_tokenizer

PROBLEM = {"question": "How many?", "answer": "1+1 = 2, so 2+2 = 4.\n#### 4"}
PAIR = {"prompt": "w1", "chosen": " w2 w3", "rejected": " w2 w4"}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def build(tmp_path, source):
    return main(["pairs", "build", "metamath", "--source", source, "--out", str(tmp_path / "out.jsonl")])


def inspect(tmp_path, file, *options):
    return main(["pairs", "inspect", file, "--out", str(tmp_path / "report"), *options])


def test_a_single_record(tmp_path, capsys):
    assert build(tmp_path, write(tmp_path / "a.jsonl", PROBLEM)) == 0
    assert "1 pair built" in capsys.readouterr().out
    assert inspect(tmp_path, str(tmp_path / "out.jsonl")) == 0
    assert "out.jsonl: 1 pair (text)" in capsys.readouterr().out


def test_an_empty_file(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl")
    assert build(tmp_path, source) == 1
    assert "expected records that pairs can be made of, got none: 0 read" in capsys.readouterr().err
    assert inspect(tmp_path, source) == 1
    assert "expected at least one pair, got none" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_line_broken_in_the_middle_of_the_file(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", *[PROBLEM] * 3, '{"question": "How', *[PROBLEM] * 3)
    assert build(tmp_path, source) == 1
    assert "a.jsonl, line 4: expected a JSON object" in capsys.readouterr().err
    pairs = write(tmp_path / "b.jsonl", *[PAIR] * 3, '{"prompt": "w1', *[PAIR] * 3)
    assert inspect(tmp_path, pairs, "--on_bad_record", "error") == 1
    assert "b.jsonl, line 4: expected a JSON object" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_pairs_that_are_all_the_same(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", *[PAIR] * 2500)
    assert inspect(tmp_path, file, "--write_clean", str(tmp_path / "clean.jsonl")) == 3
    out = capsys.readouterr().out
    assert "2,499 of 2,500 pairs (>99.9%) repeat an earlier pair to the letter" in out
    assert "2,500 of 2,500 pairs (100.0%) belong to 1 prompt" in out
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()] == [PAIR]
    drop = pq.read_table(tmp_path / "report" / "measures.parquet")["drop"].to_pylist()
    assert drop == [None, *["duplicate"] * 2499]


def test_pairs_with_twice_the_same_answer(tmp_path, capsys):
    same = {**PAIR, "rejected": PAIR["chosen"]}
    assert inspect(tmp_path, write(tmp_path / "a.jsonl", same), "--write_clean", str(tmp_path / "clean.jsonl")) == 1
    captured = capsys.readouterr()
    assert "1 of 1 pairs (100.0%) has the same answer twice" in captured.out
    assert "expected pairs that may stay, got none: all 1 are to drop" in captured.err


def test_an_answer_of_five_megabytes(tmp_path):
    answer = f"1+1 = 2, so {'数字 and words ' * 300_000}2+2 = 4.\n#### 4"
    assert len(answer.encode()) > 5e6
    assert build(tmp_path, write(tmp_path / "a.jsonl", {**PROBLEM, "answer": answer})) == 0
    assert inspect(tmp_path, str(tmp_path / "out.jsonl")) == 0
    measures = {
        name: column[0] for name, column in pq.read_table(tmp_path / "report" / "measures.parquet").to_pydict().items()
    }
    assert measures["chosen_chars"] == len(answer) + 1  # the space before it
    assert (measures["prefix"], measures["suffix"]) == (len(" 1+1 = "), len(answer) - len("1+1 = 2"))
    # of the first 20,000 characters, one differs
    assert measures["char_distance"] == pytest.approx(1 / 20_000)
    assert (tmp_path / "report" / "report.html").stat().st_size < 1e5  # a few hundred characters of it are shown


def test_the_examples_read_no_more_than_their_own_rows(tmp_path):
    """Rows whose answer has no token are not among the tokenised ones; the others keep their places."""
    records = [
        PAIR,
        {**PAIR, "chosen": " "},
        {**PAIR, "prompt": "w9"},
        {**PAIR, "rejected": " "},
        {**PAIR, "prompt": "w7 w8"},
    ]
    seen = examine_pairs(write(tmp_path / "a.jsonl", *records), tokenizer=word_tokenizer(), show_progress=False)
    tokenizer = word_tokenizer()
    for row in (0, 2, 4):
        assert seen.token_ids(row).prompt_ids == tokenizer(records[row]["prompt"])["input_ids"]
    for row in (1, 3):
        with pytest.raises(ValueError, match=f"row: expected a pair with tokens, got {row}"):
            seen.token_ids(row)
    assert np.asarray(seen.tokenised["pair_id"]).tolist() == [0, 2, 4]
