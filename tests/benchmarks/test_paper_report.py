"""docs/paper.md's tables from made-up comparisons: what is averaged, and over what."""

import numpy as np
import pytest
from datasets import Dataset
from dpop_trainer.data import tokenise_pairs
from dpop_trainer.measure.generation import Writing
from dpop_trainer.measure.pairs_under_model import PairTokenLogps, evaluate_pairs
from dpop_trainer.tools.compare.answers import Answers
from dpop_trainer.tools.compare.page import write_comparison
from dpop_trainer.tools.compare.report import Comparison, RunResult
from tiny import word_tokenizer

from benchmarks import paper

CONFIG = {
    "model_name_or_path": "m", "dataset_name": "d", "max_steps": 12, "per_device_train_batch_size": 4,
    "learning_rate": 1e-3, "beta": 0.3, "dpop_lambda": 50,
}  # fmt: skip


def run(method, seed, chosen, rejected, *, first_norm=1.0, right=4):
    """One pair of answers of four tokens, whose last ones change; norms: 99, then nine of `first_norm`, then 3, 3."""
    pair = {"prompt_ids": [5], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [6, 10, 8, 9]}
    dataset, _ = tokenise_pairs(Dataset.from_list([pair]), word_tokenizer())
    before = [PairTokenLogps(np.full(4, -2.0), np.full(4, -3.0))]
    after = [PairTokenLogps(np.array([-2, -2, -2, chosen - 2]), np.array([-3, -3, -3, rejected - 3]))]
    gradients = {"step": list(range(1, 13)), "grad_norm": [99.0, *[first_norm] * 9, 3.0, 3.0]}
    history = {"step": [0, 12], "chosen": [0.0, chosen], "rejected": [0.0, rejected]}
    evaluation = evaluate_pairs(after, before, dataset)
    return RunResult(method, seed, 1, evaluation, history, 1.0, gradients, Answers(right, 0, 8), Answers(5, 0, 8))


@pytest.fixture
def record(tmp_path, monkeypatch):
    """record(name, runs): `dpop compare` has written them."""
    monkeypatch.setattr(paper, "RESULTS", tmp_path)

    def write(name, runs):
        methods = list(dict.fromkeys(run.method for run in runs))
        write_comparison(Comparison(methods, runs, CONFIG, {"torch": "2.13.0"}), tmp_path)
        (tmp_path / "compare.json").rename(tmp_path / f"{name}.json")

    return write


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}


def test_beta_by_hand(record):
    record("gsm8k", [run(method, seed, -4.0 - 2 * seed, -7.0) for method in [*paper.BETAS, "IPO"] for seed in (0, 1)])
    found = rows(paper.beta())
    # -4 and -6: mean -5, standard deviation √2; 3 and 1 apart; half per token, as two follow the edit
    assert found["DPO, β = 0.3"] == ["−5.00 ± 1.41", "+2.00 ± 1.41", "−2.50 ± 0.71"]
    assert len(found) == 2 + 6  # with the titles and their rule; IPO has no part in it
    assert "IPO" not in found


def test_guidance_by_hand(record, tmp_path):
    (tmp_path / "guidance").mkdir()
    for model, right in enumerate((2, 4)):
        runs = [run("DPO", 0, -1.0, -2.0, right=right)]
        runs += [run("DPOP", seed, 1.0 + seed, 1.0, first_norm=10.0 + 20 * seed, right=6) for seed in range(model + 1)]
        runs += [run("IPO", 0, 0.0, 0.0)] * model
        record(f"guidance/{model}", runs)
    found = rows(paper.guidance())
    # of eight problems five are right before: -3 and -1 of them are -37.5 and -12.5 points
    assert found["DPO"] == ["−1.00 ± 0.00", "−2.00 ± 0.00", "−25.0 ± 17.7", "1", "1"]
    # the second model's two seeds are one value: 1.5 beside the first's 1; norms of 10, and of 10 and 30
    assert found["DPOP"] == ["+1.25 ± 0.35", "+1.00 ± 0.00", "+12.5 ± 0.0", "15", "15"]
    assert "IPO" not in found  # which not all models were trained with
    assert "before, 62.5 and 62.5 % were right" in paper.guidance()


def test_a_part_of_the_methods_has_a_verdict_of_its_own(record):
    record(
        "gsm8k", [run(m, seed, -1.0, -2.0) for m in [*paper.LOSSES, *paper.LAMBDAS, "DPO, β = 1.0"] for seed in (0, 1)]
    )
    text = paper.low_edit()
    assert "β = 1.0" not in text
    assert "12 steps of 4 pairs, lr 0.001, β 0.3, λ 50 where nothing else is said (torch 2.13.0)" in text


def test_conversations_of_one_seed_and_how_they_are_written(record):
    before, after = Writing(40, 1, 0.05, 0.5), Writing(50, 0.5, 0.25, 0.25)
    runs = [run(method, 0, -1.0, -2.0) for method in (*paper._SHOWN["conversations"], *paper._FAST)]
    record("conversations", [one._replace(writing=after, ref_writing=before, answers=None) for one in runs])
    text = paper.conversations()
    assert "1 held-out pairs, one seed; 12 steps of 4 pairs" in text
    table = text[text.index("length, tokens") :]
    assert rows(table)["DPOP"] == ["50", "50.0 %", "25.0 %", "25.0 %"]
    assert rows(table)["before training"] == ["40", "100.0 %", "5.0 %", "50.0 %"]
