"""The script that measures a training step on a GPU: rehearsed on the CPU, TRL included, and what it does with a wrong
result."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_step


def records(folder):
    return [json.loads(line) for line in (folder / "gpu_step.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL's and what it imports
def test_rehearsal_measures_every_trainer_on_the_same_numbers(tmp_path):
    assert gpu_step.main([str(tmp_path), "--rehearse"]) == 0
    found = {record["candidate"]: record for record in records(tmp_path)}
    assert list(found) == ["rows", "trl", "packed", "flat", "tree"]
    for record in found.values():
        assert record["device"] == "cpu, interpreted"  # never to be taken for a GPU's figure
        if "skipped" not in record:
            assert record["p20_s"] <= record["median_s"] <= record["p80_s"]
            assert len(record["losses"]) == 3
    ratios = [found[name]["computed_ratio"] for name in ("rows", "tree", "packed", "flat")]
    assert ratios[0] == 1 > ratios[1] >= ratios[2] >= ratios[3]
    assert found["flat"]["padding_share"] == 0


def test_pairs_differ_in_one_word():
    pairs = gpu_step.low_edit_pairs(gpu_step.REHEARSAL)
    assert len(pairs) == 9
    for pair in pairs:
        chosen, rejected = pair["chosen"].split(), pair["rejected"].split()
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
    pair = {"prompt": "w3 w4", "chosen": " w5 w6 w7", "rejected": " w5 w8 w7"}
    assert gpu_step.logical_tokens([pair]) == 2 * (2 + 3 + 1)


def fake(monkeypatch, results):
    def measure(candidate, plan, device):
        if isinstance(results[candidate], Exception):
            raise results[candidate]
        return {"losses": [0.69, 0.68], "first_chosen_logp": -100.0, "median_s": 2.0, **results[candidate]}

    monkeypatch.setattr(gpu_step, "measure", measure)


def test_wrong_results_and_failures_cost_the_others_nothing(tmp_path, monkeypatch):
    results = {
        "rows": {},
        "tree": {"median_s": 1.0},
        "packed": {"losses": [0.69, 0.6802]},
        "flat": {"first_chosen_logp": -100.1},
        "trl": RuntimeError("out of memory"),
    }
    fake(monkeypatch, results)
    assert gpu_step.main([str(tmp_path), "--rehearse"]) == 1
    rows, trl, packed, flat, tree = records(tmp_path)
    assert (rows["speed_against_first"], tree["speed_against_first"]) == (1.0, 2.0)
    assert packed["skipped"] == "losses differ by 2.0e-04"
    assert flat["skipped"] == "log-probs of the chosen answers differ by 1.0e-03 of their value"
    assert "median_s" not in packed
    assert "median_s" not in flat
    assert trl["failed"] == "RuntimeError: out of memory"


def test_not_a_number_is_wrong():
    plan = replace(gpu_step.REHEARSAL)
    truth = {"losses": [0.69], "first_chosen_logp": -1.0}
    assert gpu_step.difference(truth, truth, plan) is None
    assert gpu_step.difference({**truth, "losses": [float("nan")]}, truth, plan)
    assert gpu_step.difference({**truth, "first_chosen_logp": float("nan")}, truth, plan)


def test_one_trainer_prints_its_record(capsys, monkeypatch, tmp_path):
    fake(monkeypatch, {"flat": {}})
    assert gpu_step.main([str(tmp_path), "--rehearse", "--one", "flat"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["median_s"] == 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would measure it")
def test_refuses_to_measure_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_step.main([str(tmp_path)])
    assert "no CUDA device here. Pass --rehearse" in capsys.readouterr().err
