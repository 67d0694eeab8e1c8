"""README and docs hold what the committed records say, and nothing typed by hand."""

import pytest
from dpop_trainer.report.svg import write_svg
from page import text_stays_inside

from benchmarks import report


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_page_is_up_to_date(page):
    assert page.read_text() == report.updated(page), "run python -m benchmarks.report"


def test_missing_marks_are_named(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- demo -->\nno end")
    monkeypatch.setitem(report.PAGES, page, {"demo": lambda: "table"})
    with pytest.raises(ValueError, match=r"page\.md: expected the marks"):
        report.updated(page)
    page.write_text("a\n<!-- demo -->\nold\n<!-- /demo -->\nb\n")
    assert report.updated(page) == "a\n<!-- demo -->\ntable\n<!-- /demo -->\nb\n"


def test_every_picture_is_up_to_date(tmp_path):
    """What the pages show is drawn from the records, and nothing else lies beside it."""
    panels = report.pictures_of_pages()
    for panel in panels:
        text_stays_inside(panel.svg)
    drawn = {panel.name: write_svg(panel, tmp_path).read_text() for panel in panels}
    kept = {path.stem: path.read_text() for path in report.IMAGES.iterdir()}
    assert kept.keys() == drawn.keys()
    assert [name for name in drawn if drawn[name] != kept[name]] == [], "run python -m benchmarks.report"


def record(chosen, seconds, solved=0.5, before=0.25):
    values = dict.fromkeys(("rejected_logratio", "after_edit_per_token", "reward_accuracy"), 0.5)
    values["exact_match"] = solved
    methods = {"sft": {"exact_match": before}, "dpo": {"chosen_logratio": chosen, **values}, "dpop": values}
    return {
        "methods": methods,
        "seconds": seconds,
        "device": "CPU, 2 threads",
        "data": {"num_eval_pairs": 7},
        "versions": {"torch": "1"},
    }


def test_the_table_is_the_median_of_the_records(monkeypatch):
    monkeypatch.setattr(report, "_records", lambda _: [record(-9.0, 60.0), record(-30.0, 120.0), record(-20.0, 180.0)])
    table = report.demo()
    assert "| DPO | **−20.0** (−30.0 … −9.0) | **+0.5** (+0.5 … +0.5) |" in table
    assert "| before (SFT) | – | – | – | – | **25%** (25% … 25%) | – |" in table
    assert "of 3 seeds, 7 held-out pairs" in table
    assert "2.0 minutes (CPU, 2 threads, torch 1)" in table


@pytest.mark.parametrize(
    ("solved", "points", "told"),
    [
        ((0.3, 0.5), "+5.0, +12.5", "DPOP solves more in every seed."),
        ((0.2, 0.25), "−5.0, −12.5", "DPOP solves fewer in every seed."),
        (
            (0.3, 0.25),
            "+5.0, −12.5",
            "Of DPOP the seeds disagree: no gain and no loss over the model before is claimed.",
        ),
    ],
)
def test_solving_is_compared_seed_by_seed(monkeypatch, solved, points, told):
    """Before, 0.25 and 0.375 of the problems."""
    records = [record(-1.0, 60.0, share, before) for share, before in zip(solved, (0.25, 0.375), strict=True)]
    monkeypatch.setattr(report, "_records", lambda _: records)
    table = report.demo()
    assert f"| {points} |" in table
    assert told in table
