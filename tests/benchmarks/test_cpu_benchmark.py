"""The CPU benchmark runs end to end on tiny shapes, and refuses to time a wrong result."""

import json
from pathlib import Path

import torch

from benchmarks import cpu_head


def test_rehearsal_writes_records(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert cpu_head.main([str(tmp_path / "out" / "cpu.jsonl"), "--rehearse"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "cpu.jsonl").read_text().splitlines()]
    named = {(record["head"], record["candidate"]) for record in records}
    assert named >= {(head, c) for head in ("frozen", "trainable") for c in ("products", "ours", "eager")}
    for record in records:
        assert record["seconds"] > 0
        assert record["shape"] == {"num_tokens": 64, "hidden_size": 32, "vocab_size": 500}
        if record["candidate"] != "products":
            assert record["logp_error_nats"] < 1e-5


def test_wrong_result_is_not_timed(monkeypatch):
    def broken(hidden_states, weight, target_ids):
        return cpu_head.eager(hidden_states, weight, target_ids) * (1 + 1e-3)

    monkeypatch.setitem(cpu_head.CANDIDATES, "ours", broken)
    record = cpu_head.measure("ours", False, cpu_head.REHEARSAL)
    assert record["seconds"] is None
    assert record["refused"] == "wrong result"
    assert torch.isfinite(torch.tensor(record["logp_error_nats"]))
