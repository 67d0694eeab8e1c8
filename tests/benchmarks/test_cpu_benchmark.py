"""The CPU benchmark runs end to end on tiny shapes, and refuses to time a wrong result."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import cpu_head

ROOT = Path(__file__).parents[2]


def test_rehearsal_writes_records(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cpu_head.main([str(tmp_path / "out" / "cpu.jsonl"), "--rehearse"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "cpu.jsonl").read_text().splitlines()]
    named = {(record["head"], record["candidate"]) for record in records}
    assert named >= {(head, c) for head in ("frozen", "trainable") for c in ("products", "ours", "eager")}
    for record in records:
        assert record["seconds"] > 0
        assert record["shape"] == {"num_tokens": 64, "hidden_size": 32, "vocab_size": 500}
        if record["candidate"] != "products":
            assert record["logp_error_nats"] < 1e-5


def test_a_candidate_is_measured_in_a_process_of_its_own():
    """As the command starts it: one line of JSON."""
    command = [sys.executable, "-m", "benchmarks.cpu_head", "unused", "--rehearse", "--one", "eager", "frozen"]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    record = json.loads(run.stdout.splitlines()[-1])
    assert (record["candidate"], record["head"]) == ("eager", "frozen")
    assert record["logp_error_nats"] < 1e-5


def test_wrong_result_is_not_timed(monkeypatch):
    def broken(hidden_states, weight, target_ids):
        return cpu_head.eager(hidden_states, weight, target_ids) * (1 + 1e-3)

    monkeypatch.setitem(cpu_head.CANDIDATES, "ours", broken)
    record = cpu_head.measure("ours", False, cpu_head.REHEARSAL)
    assert record["seconds"] is None
    assert record["refused"] == "wrong result"
    assert torch.isfinite(torch.tensor(record["logp_error_nats"]))
