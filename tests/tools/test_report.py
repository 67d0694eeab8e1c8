"""README and docs hold what the committed records say, and nothing typed by hand."""

import pytest

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


def test_the_table_is_the_median_of_the_records(monkeypatch):
    def record(chosen, seconds):
        values = dict.fromkeys(("rejected_logratio", "after_edit_per_token", "reward_accuracy", "exact_match"), 0.5)
        methods = {"sft": {"exact_match": 0.25}, "dpo": {"chosen_logratio": chosen, **values}, "dpop": values}
        return {
            "methods": methods,
            "seconds": seconds,
            "device": "CPU, 2 threads",
            "data": {"num_eval_pairs": 7},
            "versions": {"torch": "1"},
        }

    monkeypatch.setattr(report, "_records", lambda _: [record(-9.0, 60.0), record(-30.0, 120.0), record(-20.0, 180.0)])
    table = report.demo()
    assert "| DPO | **-20.0** (-30.0 … -9.0) | **+0.5** (+0.5 … +0.5) |" in table
    assert "| before (SFT) | – | – | – | – | **25%** (25% … 25%) |" in table
    assert "of 3 seeds, 7 held-out pairs" in table
    assert "2.0 minutes (CPU, 2 threads, torch 1)" in table
