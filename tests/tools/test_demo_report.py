"""The table is aligned, the verdict follows the numbers, the page says the judgement first and needs nothing else."""

import copy
import re

import pytest
from dpop_trainer.report.plots import logratio_panels
from dpop_trainer.tools.demo.report import format_table, format_verdict, headline, write_report
from dpop_trainer.tools.demo.run import _one_problem
from dpop_trainer.tools.demo.word_problems import Problem
from page import Page

SUMMARY = {
    "config": {"beta": 0.3, "note": "<b>&"},
    "versions": {"torch": "2.13.0"},
    "device": "cpu",
    "seconds": 200.4,
    "data": {
        "num_train_problems": 6000,
        "num_pairs": 1600,
        "num_eval_pairs": 200,
        "vocab_size": 700,
        "mean_answer_tokens": 61.6,
    },
    "example": {
        "prompt": "Question: 1 < 2 & 3?\nAnswer:",
        "chosen": " <i>3 + 4 = 17 <script>\n#### 17",
        "rejected": " <i>3 + 4 = 12 <script>\n#### 17",
    },
    "answers": {
        "number": 2,
        "num_problems": 128,
        "question": "How many <plums>?",
        "right": "15",
        "texts": {"sft": "14 + 1\n#### 15", "dpo": "<i>never</i>", "dpop": "#### 15"},
        "is_right": {"sft": True, "dpo": False, "dpop": True},
    },
    "methods": {
        "sft": {"exact_match": 0.9},
        "dpo": {
            "chosen_logratio": -10.0,
            "rejected_logratio": -20.5,
            "before_edit_per_token": -0.1,
            "at_edit_per_token": 0.2,
            "after_edit_per_token": -0.25,
            "reward_accuracy": 0.94,
            "exact_match": 0.05,
            "train_seconds": 30.0,
        },
        "dpop": {
            "chosen_logratio": 0.5,
            "rejected_logratio": -3.0,
            "before_edit_per_token": 0.0,
            "at_edit_per_token": 0.1,
            "after_edit_per_token": 0.001,
            "reward_accuracy": 0.91,
            "exact_match": 0.765,
            "train_seconds": 30.0,
        },
    },
}


def summary_with(dpo: float, dpop: float) -> dict:
    summary = copy.deepcopy(SUMMARY)
    summary["methods"]["dpo"]["chosen_logratio"] = dpo
    summary["methods"]["dpop"]["chosen_logratio"] = dpop
    return summary


def test_table():
    lines = format_table(SUMMARY).split("\n")
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert cells[0] == [
        "chosen Δ (nats)", "rejected Δ (nats)", "after edit Δ (nats/token)", "reward accuracy", "exact match",
    ]  # fmt: skip
    assert cells[1:] == [
        ["SFT", "—", "—", "—", "—", "90.0%"],
        ["DPO", "−10.00", "−20.50", "−0.250", "94.0%", "5.0%"],
        ["DPOP", "+0.50", "−3.00", "+0.001", "91.0%", "76.5%"],
    ]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_table_without_a_number():
    assert re.search(r"DPO +— +−20\.50", format_table(summary_with(float("nan"), 0.5)))


def test_verdict():
    verdict = format_verdict(SUMMARY)
    assert "DPO lowered the chosen answers by 10.00 nats; DPOP raised the chosen answers by 0.50 nats" in verdict
    assert "−0.250 nats with DPO and +0.001 nats with DPOP" in verdict
    assert "5.0% after DPO and 76.5% after DPOP; the SFT model had 90.0%" in verdict
    assert verdict.endswith("DPO lowered the very answers that it was to prefer; DPOP's penalty prevented that.")


@pytest.mark.parametrize(
    ("dpo", "dpop", "expected"),
    [
        (-10.0, 0.5, "DPOP's penalty prevented that."),
        (-10.0, -0.004, "DPOP's penalty prevented that."),  # rounds to 0.00
        (-10.0, -2.5, "DPOP's penalty removed 75 % of that fall."),
        (-10.0, -0.01, "DPOP's penalty removed 99 % of that fall."),  # 99.9 %, never rounded up to all
        (-10.0, -10.0, "the penalty did not help in this run."),
        (-10.0, -12.0, "the penalty did not help in this run."),
        (0.3, 0.5, "no fall for the penalty to prevent."),
        (-0.004, 0.0, "no fall for the penalty to prevent."),
        (0.3, -0.5, "not what the penalty is for."),
        (float("nan"), 0.5, "A run without a number allows no conclusion."),
        (-10.0, float("nan"), "A run without a number allows no conclusion."),
    ],
)
def test_the_conclusion_follows_the_numbers(dpo, dpop, expected):
    assert format_verdict(summary_with(dpo, dpop)).endswith(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (-1.5, "DPO lowered the chosen answers by 1.50 nats;"),
        (1.5, "DPO raised the chosen answers by 1.50 nats;"),
        (-0.001, "DPO left the chosen answers unchanged;"),
        (float("nan"), "DPO has no number for the chosen answers;"),
    ],
)
def test_the_movement_is_named(change, expected):
    assert format_verdict(summary_with(change, 0.0)).startswith(expected)


def page_of(summary, panels, tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(summary, panels, path)
    return Page(path.read_text(encoding="utf-8"))


def test_report_is_self_contained_and_escaped(tmp_path):
    histories = {"DPO": {"step": [0, 4], "chosen": [0.0, -1.0], "rejected": [0.0, -2.0]}}
    page = page_of(SUMMARY, {"Title <1>": logratio_panels(histories)}, tmp_path)
    assert not page.tags & {"i", "plums"}
    assert page.of("svg", **{"aria-label": "Chosen answers"})
    for shown in ("<b>&", "Title <1>", "How many <plums>?", "<i>never</i>"):
        assert shown in page.text
    assert page.marked == [("chosen", "17"), ("rejected", "12")]  # the number as a whole, once in each answer


def test_the_judgement_comes_first_then_three_tiles_then_what_the_models_write(tmp_path):
    page = page_of(SUMMARY, {}, tmp_path)
    assert headline(SUMMARY) == "DPO lowered the chosen answers by 10.00 nats; DPOP raised them by 0.50 nats."
    assert len(page.of("div", class_="tile")) == 3
    order = [
        headline(SUMMARY),
        "−10.00 nats",
        "+0.50 nats",
        "5% | 76%",
        "How many <plums>?",
        "Results",
        "Configuration",
    ]
    places = [page.text.index(told) for told in order]
    assert places == sorted(places)
    assert [told in page.text for told in ("before (SFT): right", "DPO: wrong", "DPOP: right")] == [True] * 3


def test_the_problem_shown_is_the_first_that_is_answered_differently():
    problems = [Problem(f"q{i}", f"#### {i}") for i in range(3)]
    answers = {
        "sft": ["#### 0", "a #### 1", "x"],
        "dpo": ["#### 0", "b #### 9", "y"],
        "dpop": ["#### 0", "#### 1", "z"],
    }
    shown = _one_problem(answers, problems)
    assert (shown["number"], shown["num_problems"], shown["question"]) == (2, 3, "q1")
    assert shown["is_right"] == {"sft": True, "dpo": False, "dpop": True}
    alike = dict.fromkeys(answers, ["#### 0"] * 3)
    assert _one_problem(alike, problems)["number"] == 1


def test_marked_words_are_escaped_too(tmp_path):
    example = {"prompt": "", "chosen": "1 < 2", "rejected": "1 & 2"}
    page = page_of({**SUMMARY, "example": example}, {}, tmp_path)
    assert page.marked == [("chosen", "<"), ("rejected", "&")]


def test_report_tells_the_run(tmp_path):
    text = page_of(SUMMARY, {}, tmp_path).text
    for fact in (
        "6,000 generated",
        "1,600 low-edit",
        "200 held-out",
        "62 tokens",
        "200 s",
        "−20.50",
        "penalty prevented",
    ):
        assert fact in text
