"""A few of the attacks that `make test-attacks` makes by the hundred, and that they would find what falls."""

import attacks
import pytest


def test_records_of_any_shape_stand():
    result = attacks.attack_records(3000, seed=1)
    assert result.fallen == []


@pytest.mark.forked
@pytest.mark.slow
def test_damaged_files_are_named():
    names = ["pairs.jsonl.gz", "pairs.parquet", "mt/model_judgment/j_single.jsonl"]
    result = attacks.attack_files(len(names), 1, names)
    assert result.fallen == []


@pytest.mark.forked
@pytest.mark.slow
def test_command_lines_of_any_words_stand():
    assert attacks.attack_lines(3, 1).fallen == []


@pytest.mark.parametrize(
    ("code", "output", "fault"),
    [
        (0, "Written: x", None),
        (1, "dpop pairs: pairs.jsonl, line 3: expected a JSON object", None),
        (1, "dpop pairs: something", "pairs.jsonl is not named"),
        (1, f"dpop pairs: while x: KeyError: pairs.jsonl\n{attacks.FAULT}", "not foreseen"),
        (2, "", "nothing said"),
        (0, "a\x1b[2J", "a control character"),
        (-11, "", "exit code -11"),
        (-9, "", f"not ended after {attacks.BOUND:g} seconds"),
    ],
)
def test_what_falls_is_found(code, output, fault):
    assert attacks.fault_of(code, output, ("pairs.jsonl",)) == fault
