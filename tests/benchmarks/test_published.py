"""What peers have published, and ours beside it: by hand."""

import json

import pytest

from benchmarks import levels, published, records, steps


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_heads_by_hand():
    """Three bare products took 42 ms: two are 28, four 56. Without a known rate, 17.6 TFLOP each at 790 a second."""
    of_trl, of_liger = cells(published.heads())
    assert of_trl[3:7] == ["28", "42", "56", "728"]
    assert of_liger[3:7] == ["45", "67", "89", "790"]
    mib = 1 << 20
    head = published.Head(8192, 4096, 151936, {}, None)
    # a tile in fp32, its exponentials, the rows' products with W, their targets' rows; two of the states' size
    assert published.held_bytes(head, trainable=False) == (32 + 16 + 16 + 16 + 2 * 64) * mib
    # states in fp32, a tile, a gradient tile; the states' and W's gradients
    gradients = 64 * mib + 151936 * 4096 * 2
    assert published.held_bytes(head, trainable=True) == (128 + 32 + 256) * mib + gradients


def test_steps_are_the_plan_s(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "PLANNED", tmp_path / "planned.json")
    steps = {"LoRA": {"longest_tokens": 61000, "gib": 5.125}, "all weights": {"longest_tokens": None, "gib": 20.0}}
    published.PLANNED.write_text(json.dumps({"steps": steps}))
    assert cells(published.steps()) == [
        ["TRL, published", "59,392", "12.00 GiB"],
        ["ours, LoRA, `dpop plan`", "61,000", "5.12 GiB"],
        ["ours, all weights, `dpop plan`", "–", "20.00 GiB"],
    ]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(versions): those where the pages were made."""
    monkeypatch.setattr(levels, "INSTALLED", tmp_path / "installed.json")
    return lambda versions: levels.INSTALLED.write_text(json.dumps(versions))


def test_a_newer_peer_is_named(installed):
    trl = levels.all_peers()["TRL"]
    assert levels._since(trl, "1.16.0") == ""  # nothing has been written down
    installed({"trl": "1.17.0"})
    assert levels._since(trl, "1.16.0") == "; 1.17.0 is out"
    assert levels._since(trl, "1.17.0") == levels._since(trl, "1.18.0") == levels._since(trl, "–") == ""
    installed({"trl": "1.16.0+cpu"})  # of which build is no matter
    assert levels._since(trl, "1.16.0") == ""


def test_what_is_not_here_keeps_what_was_written_of_it(installed, monkeypatch):
    installed({"flash-linear-attention": "0.4", "trl": "1.0.0"})
    monkeypatch.setattr(records, "version", {"trl": "1.17.0"}.get)
    levels.note_installed()
    assert json.loads(levels.INSTALLED.read_text()) == {"flash-linear-attention": "0.4", "trl": "1.17.0"}


def test_each_machine_keeps_its_own_ratio(tmp_path, monkeypatch):
    """Ours of one machine is never set against TRL's of another; the machine that was measured last comes first."""
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    versions = {"trl": "1.16.0"}
    common = {"peak_mib": 512.0, "versions": versions, "largest_loss_difference": 1e-6}
    for device, candidate, seconds in (
        ("CPU, AVX512", "flat", 0.5),
        ("CPU, AVX512", "trl", 3.0),
        ("CPU, AVX2", "rows", 2.0),
        ("CPU, AVX2", "flat", 1.0),
        ("CPU, AVX2", "trl", 7.0),
    ):
        record = {"device": device, "candidate": candidate, "seconds_per_step": seconds, **common}
        records.append(tmp_path / "cpu_step.jsonl", record)
    text = steps.sentence()
    assert "CPU, AVX2) takes **1.00 s** and 0.5 GiB, TRL 1.16.0's 7.00 s and 0.5 GiB: 7.0 times faster" in text
    assert "Elsewhere (CPU, AVX512): 0.50 s and TRL 1.16.0's 3.00 s, 6.0 times." in text


def test_a_step_stands_beside_its_own_products(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    common = {"model": "Chat", "device": "CPU, AVX2", "date": "2026-01-01", "largest_loss_difference": 1e-6}
    common |= {"versions": {"trl": "1.16.0", "torch": "2.13.0"}, "pairs": "GSM8K low-edit"}
    for candidate, seconds, alone in (("flat", 6.0, 5.0), ("trl", 24.0, 12.0), ("trl, answers alone", 15.0, 10.0)):
        record = {"candidate": candidate, "seconds_per_step": seconds, "products_seconds": alone, "peak_mib": 2048.0}
        records.append(tmp_path / "chat_step.jsonl", common | record)
    half = {"candidate": "flat", "seconds_per_step": 3.0, "products_seconds": 1.5, "peak_mib": 1024.0}
    records.append(tmp_path / "chat_step.jsonl", common | half | {"precision": "bf16"})
    for candidate, seconds in (("flat", 0.5), ("trl", 1.0)):
        record = {"candidate": candidate, "seconds_per_step": seconds, "peak_mib": 512.0}
        records.append(tmp_path / "cpu_step.jsonl", common | record)
    assert steps.sentence().endswith(
        " A step of Chat (CPU, AVX2): 6.0 s and 2.0 GiB; TRL's 24.0 s and 2.0 GiB, or 15.0 s and 2.0 GiB with the "
        "answers alone ([benchmarks](docs/benchmarks.md))."
    )
    text = steps.of_a_chat_model()
    assert "| ours, flat | 6.00 | 5.00 | 1.20 | 2.0 GiB |" in text
    assert "| TRL 1.16.0, answers alone | 15.00 | 10.00 | 1.50 | 2.0 GiB |" in text
    assert text.count("8 pairs, fp32, CPU, AVX2") == text.count("8 pairs, bf16 autocast, CPU, AVX2") == 1
    assert "| ours, flat | 3.00 | 1.50 | 2.00 | 1.0 GiB |" in text  # in a table of its own, and not README's
