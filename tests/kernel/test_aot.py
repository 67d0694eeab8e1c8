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


# All launches for an H100, and for each other target the launch of each kernel that asks the most of it, the last in
# the list: each launch is compiled, and each kernel for each target. Without flags the command compiles every launch
# for every target.
SOME_FOR_ALL = """
import sys
from dpop_kernels import aot

status = aot.main(["--target", "sm_90"])
fullest = {launch.kernel.__name__: (name, launch) for name, launch in aot.all_launches().items()}
aot.all_launches = lambda: dict(fullest.values())
others = [f"--target={target}" for target in aot.TARGETS if target != "sm_90"]
sys.exit(status or aot.main(others))
"""

OF_THE_BENCHMARK = """
from benchmarks import gemm_head
from dpop_kernels import aot

for launch in gemm_head.aot_launches().values():
    usage = aot.compile_launch(launch, "sm_90")
    print(usage.spill_stores, usage.spill_loads, usage.shared_memory, "wgmma.mma_async" in usage.assembly)
"""


def lines_of(code, cache):
    """What a process of its own prints, in which kernels are compiled and nothing is found compiled before."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()


def test_every_launch_compiles_and_every_kernel_for_every_target_without_spills(tmp_path):
    lines = lines_of(SOME_FOR_ALL, tmp_path)
    rows = [line for line in lines if line.split()[:3] != ["kernel", "launch", "target"]]
    assert len(lines) == len(rows) + 2
    pattern = r"(\w+)\s+(\S.*?)\s+(\w+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)"
    matches = [re.fullmatch(pattern, row) for row in rows]
    assert all(matches), lines
    table = [match.groups() for match in matches]
    assert {launch for _, launch, target, *_ in table if target == "sm_90"} == set(aot.all_launches())
    kernels = {launch.kernel.__name__ for launch in aot.all_launches().values()}
    assert {(kernel, target) for kernel, _, target, *_ in table} == {(k, t) for k in kernels for t in aot.TARGETS}
    assert len({row[:3] for row in table}) == len(table)
    for row in table:
        registers, spill_stores, spill_loads, shared_memory = map(int, row[3:7])
        assert spill_stores == spill_loads == 0, row
        assert 1 <= registers <= 255, row  # 255 is what an instruction can address; a wrong parse shows here
        assert shared_memory < 48 * 1024, row  # what any program may use without asking


def test_the_benchmark_s_matrix_products_have_hopper_s_own_instruction(tmp_path):
    """They are of little use if they compile to Ampere's. What a program asks for is less than an A100 has."""
    lines = lines_of(OF_THE_BENCHMARK, tmp_path)
    assert len(lines) == 2  # log-probs alone, and exponentials in bf16 beside them
    for line in lines:
        stores, loads, shared_memory, has_instruction = line.split()
        assert (stores, loads, has_instruction) == ("0", "0", "True")
        assert int(shared_memory) < 163 * 1024


def test_every_kernel_has_a_launch():
    defined = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert len(defined) == 8
    assert {launch.kernel.__name__ for launch in aot.all_launches().values()} == defined


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
