"""Corruption changes one intermediate result and nothing else; pairs are repeatable, and no record goes missing."""

import json
import random
import re

import pytest
from dpop_trainer.tools.pairs.counts import PairCounts
from dpop_trainer.tools.pairs.metamath import (
    NO_RESULT,
    build_pairs,
    corrupt_intermediate_result,
    final_answer,
    strip_calculator_marks,
)

MARKED = "She sold 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72 clips.\n#### 72"
PLAIN = "She sold 48/2 = 24 clips.\nTogether 48+24 = 72 clips.\n#### 72"
RECORD = {"question": "How many clips?", "answer": MARKED}


def originals(answer: str, draws: int = 200) -> set[str]:
    """Every number that is ever corrupted. A result among four is missed by 200 draws with probability 0.75**200."""
    return {corrupt_intermediate_result(answer, random.Random(i)).original for i in range(draws)}


def test_calculator_marks_are_stripped():
    assert strip_calculator_marks(MARKED) == PLAIN
    assert strip_calculator_marks("$<<12/60=0.2>>0.2 and 3 << 4") == "$0.2 and 3 << 4"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (PLAIN, {"24"}),  # not the last equation, not the final answer
        ("1+1 = 2. 2+2 = 4. 4+4 = 8. 8+8 = 16.\n#### 16", {"2", "4", "8"}),
        ("3*4 = 12.\n#### 12", {"12"}),  # the last equation where there is no other
        ("1+1 = 2\n2+2 = 4\nThe answer is: = 5", {"2"}),  # MetaMath's second form of the final answer
        ("1+1=2 and 2+2=4", {"2"}),  # no spaces, no final answer
        ("half of it = 24/2 = 12\n2*12 = 24", {"12"}),  # 24 goes on to an expression
        ("x = 24 + 3 = 27, y = 5", {"27"}),
        ("x = 3x4 = 12, y = 3 x 4 = 13, z = 4", {"12", "13"}),
        ("x = 3y, y = 4m, z = 5km, w = 6", {"5"}),  # a variable's factor is no result, a length is
        ("a = 2(3 + 1) = 8, b = 5 1/2, c = 1", {"8"}),
        ("at 4 o'clock = 16:00, so 20-16 = 4 hours. 4*2 = 8", {"4"}),
        ("pay = $5/hour. 5*8 = 40", {"5"}),  # a unit, not a division
        ("12 = 12 - which is fine. 1+1 = 2", {"12"}),
        ("1+1 = 2\n- then 2+2 = 4\n- and 3", {"2"}),  # list items are not subtractions
        ("share = 20% of it. = 4", {"20"}),
        ("share = 20% * 50 = 10. 2*10 = 20", {"10"}),
    ],
)
def test_which_numbers_can_be_corrupted(answer, expected):
    assert originals(answer) == expected


@pytest.mark.parametrize(
    "answer",
    ["", "#### 72", "no numbers = here", "= 12/4", "The answer is 5 = 5", "12 apples", "equals 12", "= \\frac{1}{2}"],
)
def test_nothing_to_corrupt(answer):
    assert corrupt_intermediate_result(answer, random.Random(0)) is None


@pytest.mark.parametrize(
    ("number", "form"),
    [
        ("7", r"[1-9]"),
        ("24", r"[1-9]\d"),
        ("$1,250.50", r"\$[1-9],\d{3}\.\d\d"),
        ("$ 12", r"\$ [1-9]\d"),
        ("-3", r"-[1-9]"),
        ("-$3", r"-\$[1-9]"),
        ("0.25", r"\d\.\d\d"),
        (".5", r"\.\d"),
        ("0", r"[1-9]"),
        ("€1,000,000", r"€[1-9],\d{3},\d{3}"),
    ],
)
def test_the_number_keeps_its_form_and_never_its_value(number, form):
    answer = f"first 1+1 = {number} of them. = 1"
    for seed in range(100):
        rejected, start, end, original, replacement = corrupt_intermediate_result(answer, random.Random(seed))
        assert rejected == answer[:start] + replacement + answer[end:]
        assert answer[start:end] == original
        assert re.fullmatch(rf"first 1\+1 = {form} of them\. = 1", rejected)
        assert float(original.replace(",", "")) != float(replacement.replace(",", ""))


def test_every_other_digit_is_a_possible_replacement():
    replacements = {corrupt_intermediate_result("= 24. = 1", random.Random(i)).replacement for i in range(1000)}
    assert replacements == {f"{d}4" for d in "13456789"} | {f"2{d}" for d in "012356789"}


def test_marks_are_refused_by_name():
    with pytest.raises(ValueError, match="answer: expected no calculator marks"):
        corrupt_intermediate_result(MARKED, random.Random(0))


def test_a_pair():
    (pair,) = build_pairs([RECORD], seed=0)
    assert list(pair) == ["prompt", "chosen", "rejected", "edit_original", "edit_replacement"]
    assert pair["prompt"] == "Question: How many clips?\nAnswer:"
    assert pair["chosen"] == f" {PLAIN}"
    assert pair["edit_original"] == "24"
    assert pair["rejected"] == " " + PLAIN.replace("= 24", f"= {pair['edit_replacement']}")
    assert pair["edit_replacement"] != "24"


def test_the_seed_decides_and_each_record_stands_alone():
    records = [RECORD] * 40
    pairs = list(build_pairs(records, seed=5))
    assert pairs == list(build_pairs(iter(records), seed=5))
    assert pairs != list(build_pairs(records, seed=6))
    # 40 equal records draw from 40 generators: 17 replacements exist, so they can't all agree
    assert len({pair["edit_replacement"] for pair in pairs}) > 1
    shortened = [{**RECORD, "answer": "nothing"}, *records[1:]]
    assert list(build_pairs(shortened, seed=5)) == pairs[1:]


def test_counts_say_what_became_of_the_records():
    counts = PairCounts()
    pairs = build_pairs([RECORD, {**RECORD, "answer": "#### 5"}, RECORD], seed=0, counts=counts)
    assert (counts.built, counts.skipped) == (0, {})  # lazy
    assert len(list(pairs)) == 2
    assert (counts.built, counts.skipped) == (2, {NO_RESULT: 1})
    assert str(counts) == f"2 pairs built; 1 skipped: {NO_RESULT}"


def test_other_field_names():
    records = [{"query": "How many clips?", "response": MARKED}]
    assert list(build_pairs(records, 0, question_field="query", answer_field="response")) == list(
        build_pairs([RECORD], 0)
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, r"records\[1\]\['answer'\]: expected a non-empty string, got fields \['question'\]"),
        ({"question": None, "answer": "a"}, r"records\[1\]\['question'\]: expected a non-empty string, got None"),
        ({"question": "q", "answer": ""}, r"records\[1\]\['answer'\]: expected a non-empty string, got ''"),
        ({"question": " \n", "answer": "a"}, r"records\[1\]\['question'\]: expected a non-empty string"),
        ({"question": "q", "answer": 12}, r"records\[1\]\['answer'\]: expected a non-empty string, got 12"),
    ],
)
def test_malformed_records_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        list(build_pairs([RECORD, record], seed=0))


def test_gsm8k(shared_data):
    source = shared_data / "gsm8k" / "train.jsonl"
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    counts = PairCounts()
    pairs = list(build_pairs(records, seed=0, counts=counts))
    assert counts.built + counts.skipped.total() == len(records)
    # GSM8K's own marks show which solutions compute anything; a few write "equals" for "="
    assert counts.built >= 0.99 * sum("<<" in record["answer"] for record in records)
    for pair in pairs:
        chosen, rejected = pair["chosen"], pair["rejected"]
        assert "<<" not in chosen
        assert len(chosen) == len(rejected)
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
        assert chosen[chosen.index("####") :] == rejected[rejected.index("####") :]
        assert final_answer(chosen) == final_answer(rejected) is not None
