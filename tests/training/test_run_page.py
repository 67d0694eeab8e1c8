"""A run's page says where the run stands, shows what there is, and lets no path of the machine out."""

import math
from types import SimpleNamespace

import pytest
from dpop_trainer.report.run_page import _LARGE, _SMALL, PAGE_FILE, RunPage, write_run_page
from page import Page

KEYS = [series.key for chart in (*_LARGE, *_SMALL) for series in chart.series]
CONFIG = {"loss_type": ["dpop"], "model_name_or_path": "/home/someone/model", "dataset_name": "/data/pairs.jsonl"}


def page_of(metrics, folder, config=CONFIG):
    write_run_page(metrics, config, folder)
    return Page((folder / PAGE_FILE).read_text(encoding="utf-8"))


def lines(keys, num=29):
    return [{"step": step, **dict.fromkeys(keys, 0.5 * (1 + step / 7))} for step in range(1, num + 1)]


def test_the_change_of_the_answers_and_the_margin_are_large(tmp_path):
    page = page_of(lines(KEYS), tmp_path)
    charts = page.of("svg")
    assert len(charts) == len(_LARGE) + len(_SMALL)
    widths = [float(chart["viewbox"].split()[2]) for chart in charts]
    assert [chart["aria-label"] for chart in charts[:2]] == ["Change of the answers", "Margin"]
    assert widths[:2] == [440, 440]
    assert set(widths[2:]) == {360}


def test_it_is_titled_with_run_and_data_and_judges(tmp_path):
    (tmp_path / "mine").mkdir()
    metrics = [*lines(["dpop/chosen_logratio"], 7), {"step": 7, "eval_dpop/chosen_logratio": -1.25}]
    page = page_of(metrics, tmp_path / "mine")
    assert "mine · DPOP · /home/someone/model · on /data/pairs.jsonl" in page.text  # as it was given
    assert "Step 7: the chosen answers' log-prob -1.25 nats an answer (held-out pairs)" in page.text
    trained = page_of(lines(["dpop/chosen_logratio"], 7), tmp_path / "mine")
    assert "Step 7: the chosen answers' log-prob +1.00 nats an answer (training pairs)" in trained.text  # 0.5 * 2
    assert trained.of("span", class_="good")
    assert "Step 3: loss 0.7143" in page_of(lines(["loss"], 3), tmp_path / "mine").text  # 0.5 * 10 / 7


def test_no_path_of_the_machine_is_in_it(tmp_path):
    page = RunPage(CONFIG)
    (tmp_path / "run").mkdir()
    page.on_train_end(
        SimpleNamespace(output_dir=str(tmp_path / "run")), SimpleNamespace(is_world_process_zero=True), None
    )
    text = (tmp_path / "run" / PAGE_FILE).read_text()
    assert "run · DPOP · model · on pairs.jsonl" in text
    assert "/home" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("num", [0, 1, 2, 4999])
def test_it_takes_what_there_is(num, tmp_path):
    metrics = [{"step": 0, "train_data/num_pairs": 5}]
    metrics += [
        {"step": step, "loss": 0.7 / step, "grad_norm": 1.0, "learning_rate": 0.0, "dpop/penalty": math.nan}
        for step in range(1, num + 1)
    ]
    page = page_of(metrics, tmp_path)
    shown = [chart["aria-label"] for chart in page.of("svg")]
    assert shown == (["Loss", "Gradient norm", "Learning rate"] if num else [])
    assert f"Step {num:,}" in page.text
    assert len((tmp_path / PAGE_FILE).read_text()) < 200_000  # thinned: at most 500 points of a line


def test_evaluations_are_hollow_points(tmp_path):
    metrics = [*lines(["dpop/chosen_logratio"]), {"step": 10, "eval_dpop/chosen_logratio": 1.0}]
    page = page_of(metrics, tmp_path)
    assert len(page.of("path", class_="hollow")) == 2  # one, and its sample in the legend
    assert "chosen Δ, evaluated, step 10: 1" in page.text
