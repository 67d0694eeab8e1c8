"""The script that measures the head on a GPU: rehearsed as a whole on the CPU, and what it does with a wrong result."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_head

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script():
    return gpu_head


@pytest.fixture
def bench(script, tmp_path):
    return script.Bench(script.REHEARSAL, tmp_path, torch.device("cpu"))


def records(folder):
    return [json.loads(line) for line in (folder / "gpu_head.jsonl").read_text().splitlines()]


# errors, but for numpy's word to triton 3.6's interpreter, as pyproject.toml has it for the tests themselves
WARNINGS = "error,ignore:Conversion of an array with ndim > 0 to a scalar is deprecated:DeprecationWarning"


def test_rehearsal_runs_every_case(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
    command = [sys.executable, "-m", "benchmarks.gpu_head", str(tmp_path / "out"), "--rehearse"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    found = records(tmp_path / "out")
    assert [(record["case"], record.get("variant")) for record in found] == [
        ("floor_copy", None),
        ("floor_gemm", None),
        ("reference_pass", "tiles"),
        ("reference_pass", "gemm"),
        ("frozen_forward_backward", "tiles"),
        ("frozen_forward_backward", "gemm"),
        ("frozen_forward_backward", "tiles"),  # in the other tiles
        ("trainable_forward_backward", "tiles"),
        ("logits_forward", None),
        ("logits_backward_in_place", None),
    ]
    assert [record["tile"] for record in found[4:7]] == [[1024, 8192], [1024, 8192], [4, 4096]]
    for record in found:
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["device"] == "cpu, interpreted"  # never to be taken for a GPU's figure
        assert record.get("meets_contract", True)


def test_wrong_result_is_recorded_and_not_timed(script, bench, monkeypatch):
    from benchmarks import gemm_head
    from dpop_kernels.logps import tiling

    exact, exact_gemm = tiling.tiled_token_logps, gemm_head.gemm_token_logps
    monkeypatch.setattr(bench, "measure", lambda function: pytest.fail("timed a wrong result"))

    def off_by_a_thousandth(*args, **kwargs):
        logps, stats = exact(*args, **kwargs)
        return logps + 1e-3, stats

    monkeypatch.setattr(tiling, "tiled_token_logps", off_by_a_thousandth)
    monkeypatch.setattr(gemm_head, "gemm_token_logps", lambda *arguments: exact_gemm(*arguments) + 1e-3)
    floors = script.Floors(bytes_per_ms=1.0, flop_per_ms=1.0)
    script.measure_head(bench, floors, "reference_pass", script.HeadShape(3, 16, 50), num_products=1)
    assert bench.any_wrong
    for record in records(bench._path.parent):
        assert record["skipped"] == "wrong result"
        assert record["max_error_nats"] == pytest.approx(1e-3, rel=1e-2)
        assert "median_ms" not in record


def test_a_variant_that_fails_leaves_the_others_their_figures(script, bench, monkeypatch):
    from benchmarks import gemm_head

    def fails(*args, **kwargs):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(gemm_head, "gemm_token_logps", fails)
    floors = script.Floors(bytes_per_ms=1.0, flop_per_ms=1e6)
    script.measure_head(bench, floors, "reference_pass", script.HeadShape(3, 16, 50), num_products=1)
    tiles, gemm = records(bench._path.parent)
    assert tiles["floor_ms"] == pytest.approx(2 * 3 * 16 * 50 / 1e6)
    assert gemm["failed"] == "RuntimeError: out of registers"


def test_past_the_deadline_no_case_begins(script, bench, monkeypatch):
    monkeypatch.setattr(bench, "is_late", lambda: True)
    floors = script.Floors(bytes_per_ms=1.0, flop_per_ms=1.0)
    script.measure_head(bench, floors, "reference_pass", script.HeadShape(3, 16, 50), num_products=1)
    script.measure_logits(bench, floors)
    assert [record["skipped"] for record in records(bench._path.parent)] == ["past the deadline"] * 3


def test_not_a_number_is_wrong(script):
    errors = {"max_error_nats": script.largest(torch.tensor([0.0, math.nan]))}
    assert script.is_wrong(errors)
    assert not script.is_wrong({"max_error_nats": 9e-5, "grad_hidden_relative": 2.9e-2})
    assert script.is_wrong({"max_error_nats": 0.0, "grad_weight_relative": 3.1e-2})
    assert script.is_wrong({"max_error_nats": 1.1e-5}, times=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would measure it")
def test_refuses_to_measure_without_a_gpu(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path)])
    assert "no CUDA device here. Pass --rehearse" in capsys.readouterr().err
