"""The one command for a GPU, rehearsed as a whole on the CPU, and what it does when time or a result runs out."""

import importlib.util
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_head, levels, records
from benchmarks.floors import TINY


def test_rehearsal_goes_all_the_way(tmp_path, monkeypatch, capsys):
    tiles = []  # test_gpu_script.py rehearses that script
    monkeypatch.setattr(gpu_head, "main", lambda arguments: tiles.append(arguments) or 0)
    assert gpu.main([str(tmp_path), "--rehearse"]) == 0
    assert " passed" in (tmp_path / "tests-0.txt").read_text()
    levels = records.read(tmp_path / "levels.jsonl")
    ours = [record for record in levels if record["peer"] == "dpop-kernels"]
    assert [(record["level"], record["task"]) for record in ours] == [
        ("head", "reference"),
        ("head", "frozen"),
        ("head", "trainable"),
        ("dpo", "frozen"),
        ("dpo", "trainable"),
        ("logits", "forward"),
        ("logits", "forward_backward"),
        ("pair_loss", "forward_backward"),
    ]
    for record in ours:
        assert record["median_s"] > 0
        assert record["device"].endswith("interpreted")  # never to be taken for a GPU's figure
    skipped = {record["peer"]: record["skipped"] for record in levels if "skipped" in record}
    assert skipped["CCE, exact"] == "needs CUDA"
    ((folder, _, seconds, rehearse),) = tiles
    assert (folder, rehearse) == (str(tmp_path), "--rehearse")
    assert 0 < float(seconds) < gpu.BUDGET
    assert "Tests passed" in capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda *args, **kwargs: True)
    monkeypatch.setattr(gpu, "run_tiles", lambda *args, **kwargs: True)


def test_past_the_budget_nothing_begins(tmp_path, quick, capsys):
    assert gpu.main([str(tmp_path), "--rehearse", "--budget", "0"]) == 0
    assert not (tmp_path / "levels.jsonl").exists()
    assert "head-reference-tiny-24: skipped, past the budget" in capsys.readouterr().out


def test_interrupted_it_keeps_its_records(tmp_path, quick, monkeypatch, capsys):
    measured = gpu.run_case

    def interrupt_at_the_second(case, *args):
        if case.task == "frozen":
            raise KeyboardInterrupt
        return measured(case, *args)

    monkeypatch.setattr(gpu, "run_case", interrupt_at_the_second)
    assert gpu.main([str(tmp_path), "--rehearse"]) == 130
    assert {record["task"] for record in records.read(tmp_path / "levels.jsonl")} == {"reference"}
    assert "Interrupted" in capsys.readouterr().out


def test_a_wrong_kernel_of_ours_fails_the_command(tmp_path, monkeypatch):
    from benchmarks import compare, plan
    from benchmarks.peers import all_peers, ours
    from dpop_kernels.logps import linear

    exact = linear.tiled_token_logps

    def off_by_a_thousandth(*args, **kwargs):
        logps, stats = exact(*args, **kwargs)
        return logps + 1e-3, stats

    monkeypatch.setattr(linear, "tiled_token_logps", off_by_a_thousandth)
    monkeypatch.setattr(ours, "BACKEND", "fused")
    case = plan.rehearsal(torch.device("cpu"))[0]
    effort = compare.Effort(rounds=1, seconds=0.0, probe=TINY)
    peers = {"dpop-kernels": all_peers()["dpop-kernels"]}
    assert not gpu.run_case(case, peers, effort, tmp_path / "levels.jsonl", {})
    (record,) = records.read(tmp_path / "levels.jsonl")
    assert record["refused"] == "wrong result"
    assert record["errors"]["logp_nats"] == pytest.approx(1e-3, rel=1e-2)


def test_a_process_is_stopped_in_time(tmp_path):
    program = "import time; print('begun', flush=True); time.sleep(60)"
    assert gpu._run([sys.executable, "-c", program], tmp_path / "log.txt", 1.0) == "stopped after 1 s"
    assert gpu._run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log.txt", 60.0) == "exit 3"


def test_the_step_is_called_where_it_is_present(tmp_path, monkeypatch):
    """Its lines become records; a step of 3 GiB over a model of 2 GiB is 1 GiB."""
    plan = {"hidden_size": 2048, "num_layers": 16, "pairs_per_step": 16}
    timed = {"median_s": 2.0, "p20_s": 1.9, "p80_s": 2.1, "tokens_per_s": 5000.0, "peak_mib": 3072, "base_mib": 2048}
    calls = []

    def measured(command, log, seconds):
        calls.append((command[-2:], seconds))
        records.append(tmp_path / "gpu_step.jsonl", {"candidate": "tree", "plan": plan, **timed})
        records.append(tmp_path / "gpu_step.jsonl", {"candidate": "trl", "plan": plan, "skipped": "not installed"})
        return "exit 0"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu, "_run", measured)
    records.append(tmp_path / "gpu_step.jsonl", {"candidate": "of an earlier run"})
    gpu.run_step(tmp_path, gpu.Clock(100.0, time.monotonic()), {"device": "H100"}, rehearse=False)
    gpu.run_step(tmp_path, gpu.Clock(10.0, time.monotonic()), {}, rehearse=False)  # too late to begin
    ((command, seconds),) = calls
    assert command == ["benchmarks.gpu_step", str(tmp_path)]
    assert 99 < seconds <= 100
    tree, trl = records.read(tmp_path / "levels.jsonl")
    assert (tree["peer"], tree["median_s"], tree["peak_bytes"]) == ("dpop-kernels, tree", 2.0, 2**30)
    assert (trl["peer"], trl["skipped"], trl["device"]) == ("TRL", "not installed", "H100")
    assert levels.size_of(tree) == "Llama 2048 x 16, 16 MetaMath-like pairs, bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the command would measure it")
def test_refuses_to_measure_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([str(tmp_path)])
    assert "no CUDA device here. Pass --rehearse" in capsys.readouterr().err
