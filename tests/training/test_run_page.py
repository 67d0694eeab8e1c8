"""A run's page says where the run stands, shows what there is, and lets no path of the machine out."""

import math
import re
from types import SimpleNamespace

import pytest
from dpop_trainer.report.charts import SMALL
from dpop_trainer.report.run_page import _LARGE, _SMALL, PAGE_FILE, RunPage, _drawn, _lines, write_run_page
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
    assert len(charts) == len(_LARGE) + len(_SMALL) - 1  # rewards are the change times beta: shown where it is not
    widths = [float(chart["viewbox"].split()[2]) for chart in charts]
    assert [chart["aria-label"] for chart in charts[:2]] == ["Change of the answers", "Margin"]
    assert widths[:2] == [400, 400]
    assert set(widths[2:]) == {360}


def test_it_is_titled_with_run_and_data_and_judges(tmp_path):
    (tmp_path / "mine").mkdir()
    metrics = [*lines(["dpop/chosen_logratio"], 7), {"step": 7, "eval_dpop/chosen_logratio": -1.25}]
    page = page_of(metrics, tmp_path / "mine")
    assert "mine · DPOP · /home/someone/model · on /data/pairs.jsonl" in page.text  # as it was given
    assert "After 7 steps the chosen answers lost 1.25 nats each, on held-out pairs" in page.text
    trained = page_of(lines(["dpop/chosen_logratio"], 7), tmp_path / "mine")
    assert "After 7 steps the chosen answers gained 1.00 nats each, on training pairs" in trained.text  # 0.5 * 2
    assert trained.of("span", class_="good")
    assert "After 3 steps: loss 0.7143" in page_of(lines(["loss"], 3), tmp_path / "mine").text  # 0.5 * 10 / 7


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
    assert f"After {num:,} step{'s' * (num != 1)}" in page.text
    assert len((tmp_path / PAGE_FILE).read_text()) < 200_000  # thinned: at most 500 points of a line


def test_evaluations_are_hollow_points(tmp_path):
    metrics = [*lines(["dpop/chosen_logratio"]), {"step": 10, "eval_dpop/chosen_logratio": 1.0}]
    page = page_of(metrics, tmp_path)
    assert len(page.of("path", class_="hollow")) == 2  # one, and its sample in the legend
    assert "chosen, held-out, step 10: 1" in page.text


def test_several_evaluation_sets_are_told_apart(tmp_path):
    losses = [{"step": 4, "eval_code_loss": 0.5, "eval_maths_loss": 0.25}]
    changes = [{"step": 4, "eval_code_dpop/chosen_logratio": 2.0, "eval_maths_dpop/chosen_logratio": -3.0}]
    page = page_of([*lines(["loss", "dpop/chosen_logratio"]), *losses, *changes], tmp_path)
    assert "After 4 steps the chosen answers gained 2.00 nats each, on held-out code pairs" in page.text
    assert "chosen, held-out maths, step 4: −3" in page.text
    assert "held-out maths, step 4: 0.25" in page.text


def test_one_spike_does_not_flatten_the_loss():
    losses = [{"step": step, "loss": 900.0 if step == 5 else 0.9} for step in range(1, 21)]
    ticks = re.findall(r'class="tick end"[^>]*>([^<]+)<', _drawn(_SMALL[0], _lines(_SMALL[0], losses), SMALL))
    assert ticks == ["0.1", "10", "1,000"]  # every second power of 0.1 to 10,000


def test_what_is_the_same_times_beta_is_shown_where_it_is_alone(tmp_path):
    page = page_of(lines(["rewards/chosen", "rewards/rejected"]), tmp_path)
    assert [chart["aria-label"] for chart in page.of("svg")] == ["Rewards"]


def test_the_last_evaluation_stands_in_tiles(tmp_path):
    last = {"dpop/chosen_logratio": 0.001, "dpop/rejected_logratio": -2.5, "rewards/accuracies": 0.643}
    page = page_of([*lines(["loss"]), {"step": 29} | {f"eval_{key}": value for key, value in last.items()}], tmp_path)
    assert len(page.of("div", class_="tile")) == 3
    assert "After 29 steps the chosen answers are where they were, on held-out pairs" in page.text
    for told in ("+0.00 nats", "−2.50 nats", "64.3%"):
        assert told in page.text
