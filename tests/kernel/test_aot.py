"""Every kernel compiles for every target without a GPU, and none of them spills a register."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpop_kernels import aot

ROOT = Path(__file__).parents[2]
KERNELS = Path(aot.__file__).parent / "kernels"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows (kernel, launch, target, registers, spill stores, spill loads, shared) of a real run, nothing cached."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "dpop_kernels.aot"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    header, *lines = run.stdout.splitlines()
    assert header.split()[:3] == ["kernel", "launch", "target"]
    pattern = r"(\w+)\s+(\S.*?)\s+(\w+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)"
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), run.stdout
    return [match.groups() for match in matches]


def test_every_launch_compiles_for_every_target_without_spills(table):
    compiled = {(launch, target) for _, launch, target, *_ in table}
    assert compiled == {(name, target) for name in aot.all_launches() for target in aot.TARGETS}
    assert len(compiled) == len(table)
    for row in table:
        registers, spill_stores, spill_loads, shared_memory = map(int, row[3:7])
        assert spill_stores == spill_loads == 0, row
        assert 1 <= registers <= 255, row  # 255 is what an instruction can address; a wrong parse shows here
        assert shared_memory < 48 * 1024, row  # what any program may use without asking


@pytest.mark.parametrize("name", ["gemm, bf16", "gemm -> bf16"])
def test_the_benchmark_s_matrix_product_has_hopper_s_own_instruction(name, tmp_path):
    """It is of little use if it compiles to Ampere's. What a program asks for is less than an A100 has."""
    code = f"""
from benchmarks import gemm_head
from dpop_kernels import aot
usage = aot.compile_launch(gemm_head.aot_launches()[{name!r}], "sm_90")
print(usage.spill_stores, usage.spill_loads, usage.shared_memory, "wgmma.mma_async" in usage.assembly)
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    stores, loads, shared_memory, has_instruction = run.stdout.split()
    assert (stores, loads, has_instruction) == ("0", "0", "True")
    assert int(shared_memory) < 163 * 1024


def test_every_kernel_is_compiled(table):
    defined = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert len(defined) == 8
    assert {kernel for kernel, *_ in table} == defined


@pytest.mark.parametrize(
    ("usage", "status"), [((40, 0, 0, 32, ""), 0), ((255, 8, 0, 32, ""), 1), ((255, 0, 4, 32, ""), 1)]
)
def test_exit_status_tells_of_spills(usage, status, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # restored afterwards: the command switches the interpreter off
    targets = []

    def compile_launch(launch, target):
        targets.append(target)
        return aot.Usage(*usage)

    monkeypatch.setattr(aot, "compile_launch", compile_launch)
    assert aot.main(["--target", "sm_90"]) == status
    assert set(targets) == {"sm_90"}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(aot.all_launches())


def test_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--target", "sm_1"])
    assert "gfx942" in capsys.readouterr().err


def test_reports_are_read():
    """One line each of what the two assemblers print; AMD's spills of both register files count."""
    spilled = ".vgpr_count:     128\n    .vgpr_spill_count: 3\n .sgpr_spill_count: 2\n"
    assert aot._amdgcn_usage(spilled) == (128, 5, 5)
    with pytest.raises(AssertionError, match="the compiler's report has changed"):
        aot._number(r"Used (\d+) registers", "ptxas info : nothing of the kind")
