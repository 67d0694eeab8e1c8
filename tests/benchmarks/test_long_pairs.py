"""Long pairs on paper: what the record says of them, held to sizes by hand."""

import json

import pytest
from dpop_trainer.tools.plan.memory import FRAGMENTATION

from benchmarks import long_pairs


def test_every_pair_fits_its_device():
    found = json.loads(long_pairs.PLANNED.read_text())["gib"]
    assert found.keys() == long_pairs.CASES.keys()
    for name, case in long_pairs.CASES.items():
        whole, tiles, offloaded = (found[name][setting] for setting in long_pairs.SETTINGS)
        assert offloaded < tiles < whole
        assert offloaded < case.gib


def test_offloading_takes_the_checkpoints_off_by_hand():
    """A third of prompt, a third shared, two thirds of tails: 200,064 positions in blocks of 128, 4,096 wide, 2 bytes,
    of 32 layers; the one that runs and the one before it are on the device."""
    found = json.loads(long_pairs.PLANNED.read_text())["gib"]["Llama-3-8B"]
    checkpoints = (32 - 2) * 200_064 * 4096 * 2 / long_pairs.GIB
    gradients = 41.9e6 * 4 / long_pairs.GIB  # all of them, in fp32, when the peak is at the backward's end
    saved = (1 + FRAGMENTATION) * (checkpoints - gradients)
    assert found["tiles"] - found["tiles, offloaded"] == pytest.approx(saved, rel=1e-3)


def test_the_table_is_the_record_s(tmp_path, monkeypatch):
    monkeypatch.setattr(long_pairs, "PLANNED", tmp_path / "record.json")
    figures = {"whole": 90.04, "tiles": 60.0, "tiles, offloaded": 30.25}
    long_pairs.PLANNED.write_text(json.dumps({"gib": dict.fromkeys(long_pairs.CASES, figures)}))
    gemma, llama, _ = long_pairs.as_table().splitlines()[2:]
    assert gemma == "| Gemma-3-1B, all weights, flash_attention_2 | 178,176 | 79 | 90.0 | 60.0 | 30.2 |"
    assert llama == "| Llama-3-8B, LoRA | 150,000 | 79 | 90.0 | 60.0 | 30.2 |"
