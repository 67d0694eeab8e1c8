"""The benchmark of MLPs over tiles: what it counts, and that it compares before it times."""

import json

import pytest
from transformers import LlamaConfig

from benchmarks import tiled_mlp


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tiled_mlp, "HIDDEN_SIZE", 64)
    monkeypatch.setattr(tiled_mlp, "WIDTHS", (128, 512))
    monkeypatch.setattr(tiled_mlp, "NUM_TOKENS", (512, 1024))
    monkeypatch.setattr(tiled_mlp, "STEP_TOKENS", 64)
    monkeypatch.setattr(tiled_mlp, "TILE", 16)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(tiled_mlp, "STEP", LlamaConfig(vocab_size=32, **sizes))
    monkeypatch.setitem(tiled_mlp.TILE_BYTES, "gpu", 2 << 20)


def test_what_is_held_and_the_time_are_recorded(tmp_path):
    path = tmp_path / "record.json"
    assert tiled_mlp.main([str(path), "--on_paper"]) == 0
    record = json.loads(path.read_text())
    assert "step" not in record
    for width, held in record["held_mib"]["tiled"].items():
        # a tile's two MiB are not exceeded; whole, gate, up and their act are kept in bf16
        assert max(held) <= 2
        assert record["held_mib"]["whole"][width][-1] >= 3 * 1024 * int(width) * 2 / 2**20
    assert tiled_mlp.main([str(path), "--rounds", "1", "--seconds", "0"]) == 0
    step = json.loads(path.read_text())["step"]
    assert step["all weights"]["ratio"] > 0
    assert step["frozen layers"]["tiled"]["rounds"] == 1


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    monkeypatch.setattr(tiled_mlp, "AGREEMENT", -1.0)
    with pytest.raises(AssertionError, match="a wrong result is not timed"):
        tiled_mlp.step_times(rounds=1, seconds=0, trained="all weights")
