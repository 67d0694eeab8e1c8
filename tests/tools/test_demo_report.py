"""The figures are drawn, the table is aligned, the verdict follows the numbers, the page needs nothing but itself."""

import base64
import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from dpop_trainer.data.edits import EditRegions
from dpop_trainer.measure.token_shift import token_shift
from dpop_trainer.report.plots import plot_logratios, plot_token_shift
from dpop_trainer.tools.demo.report import format_table, format_verdict, write_report

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


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header that every PNG begins with."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_table():
    lines = format_table(SUMMARY).split("\n")
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert cells[0] == [
        "chosen Δ (nats)", "rejected Δ (nats)", "after edit Δ (nats/token)", "reward accuracy", "exact match",
    ]  # fmt: skip
    assert cells[2:] == [
        ["SFT", "—", "—", "—", "—", "90.0%"],
        ["DPO", "-10.00", "-20.50", "-0.250", "94.0%", "5.0%"],
        ["DPOP", "+0.50", "-3.00", "+0.001", "91.0%", "76.5%"],
    ]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_table_without_a_number():
    assert re.search(r"DPO +— +-20\.50", format_table(summary_with(float("nan"), 0.5)))


def test_verdict():
    verdict = format_verdict(SUMMARY)
    assert "DPO lowered the chosen answers by 10.00 nats; DPOP raised the chosen answers by 0.50 nats" in verdict
    assert "-0.250 nats with DPO and +0.001 nats with DPOP" in verdict
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


class _Page(HTMLParser):
    """Checks that tags close in order; collects references to the outside and the marked words."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.marked: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "mark":
            self.marked.append(data)


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "logratios.png"
    plot_logratios({"DPO": {"step": [0, 4], "chosen": [0.0, -1.0], "rejected": [0.0, -2.0]}}, path)
    return path


def test_report_is_self_contained_and_escaped(tmp_path, figure):
    path = tmp_path / "new" / "report.html"
    write_report(SUMMARY, [("Title <1>", figure)], path)
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "b", "i", "iframe"}
    (source,) = page.sources
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == figure.read_bytes()
    assert "url(" not in text
    assert "&lt;b&gt;&amp;" in text
    assert "Title &lt;1&gt;" in text
    assert page.marked == ["17", "12"]  # the number as a whole, once in each answer


def test_marked_words_are_escaped_too(tmp_path):
    example = {"prompt": "", "chosen": "1 < 2", "rejected": "1 & 2"}
    write_report({**SUMMARY, "example": example}, [], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '1 <mark class="chosen">&lt;</mark> 2' in text
    assert '1 <mark class="rejected">&amp;</mark> 2' in text


def test_report_tells_the_run(tmp_path):
    path = tmp_path / "report.html"
    write_report(SUMMARY, [], path)
    text = path.read_text(encoding="utf-8")
    for fact in (
        "6,000 generated",
        "1,600 low-edit",
        "200 held-out",
        "62 tokens",
        "200 s",
        "-20.50",
        "penalty prevented",
    ):
        assert fact in text


def test_logratio_figure(figure):
    width, height = png_size(figure.read_bytes())
    assert width > 1000  # enough pixels for print at 7 inches
    assert width > height


def test_token_shift_figure_with_regions_that_are_empty(tmp_path):
    policy, ref = [[-1.0, -2.0, -4.0]], [[-1.0, -2.5, -2.0]]
    shifts = {
        "DPO": token_shift(policy, ref, [EditRegions(1, 2)]),
        "at the very beginning": token_shift(policy, ref, [EditRegions(0, 0)]),  # nothing before, nothing at
        "the whole answer": token_shift(policy, ref, [EditRegions(0, 3)]),  # nothing beside it
    }
    plot_token_shift(shifts, tmp_path / "new" / "shift.png")
    assert png_size((tmp_path / "new" / "shift.png").read_bytes())[0] > 1000


def test_same_figure_twice_gives_the_same_bytes(tmp_path):
    shift = token_shift([np.array([-1.0, -2.0])], [np.array([-1.5, -1.0])], [EditRegions(0, 1)])
    for name in ("a", "b"):
        plot_token_shift({"DPO": shift}, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figures_refuse_what_they_cannot_draw(tmp_path):
    with pytest.raises(ValueError, match="histories: expected at least one method"):
        plot_logratios({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="shifts: expected at least one method"):
        plot_token_shift({}, tmp_path / "x.png")
    with pytest.raises(
        ValueError, match=r"histories\['DPO'\]: expected three lists of one length, got .*'rejected': None"
    ):
        plot_logratios({"DPO": {"step": [0], "chosen": [0.0]}}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"'step': 2, 'chosen': 1"):
        plot_logratios({"DPO": {"step": [0, 1], "chosen": [0.0], "rejected": [0.0]}}, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
