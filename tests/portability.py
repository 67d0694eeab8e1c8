"""The numeric tests under every kind of arithmetic that this processor can be told to do: `make portability`.

    python tests/portability.py [--only avx2 ...] [pytest's own arguments]

Torch, MKL and oneDNN choose their code by the processor's instructions, and sum in another order for another number of
threads. Each setting below is one run of the numeric tests with the margins of their bounds recorded (`margins.py`).
Printed are the comparisons that came closest to their bound; those that gave the same number under every setting do not
depend on rounding and are left out. The exit status is 1 where a test fails or a margin is below `SMALLEST_MARGIN`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SMALLEST_MARGIN = 3.0
SHOWN = 15

SETTINGS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "MKL_CBWR": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "own": {},  # whatever the libraries choose, matrix units included
}
CAPABILITIES = ["default", "avx2", "avx512"]
"""Torch's, each with what those before it have. Other kinds of processor have the default and their own."""
THREADS = {"default": 1, "avx2": 2, "avx512": 4, "own": 1}

NUMERIC = [
    "benchmarks/test_gemm_head.py",
    "benchmarks/test_paper_gradient.py",
    "data/test_budget.py",
    "data/test_collate.py",
    "data/test_layout_batches.py",
    "data/test_layout_choice.py",
    "data/test_layouts.py",
    "kernel/test_backends.py",
    "kernel/test_divergences.py",
    "kernel/test_elementary.py",
    "kernel/test_entropy_gradient.py",
    "kernel/test_fused.py",
    "kernel/test_fused_linear.py",
    "kernel/test_fused_pairs.py",
    "kernel/test_head.py",
    "kernel/test_head_models.py",
    "kernel/test_head_sharded.py",
    "kernel/test_linear_logps.py",
    "kernel/test_linear_pairs.py",
    "kernel/test_lora_head.py",
    "kernel/test_loss_formulas.py",
    "kernel/test_losses.py",
    "kernel/test_losses_of_a_batch.py",
    "kernel/test_pair_loss.py",
    "kernel/test_registries.py",
    "kernel/test_trl_head.py",
    "kernel/test_trl_integration.py",
    "kernel/test_unpaired.py",
    "kernel/test_vocab_parallel.py",
    "project/test_examples.py",
    "project/test_scoring_head_page.py",
    "tools/test_ches.py",
    "tools/test_compare.py",
    "tools/test_eval_export.py",
    "tools/test_evaluate.py",
    "tools/test_inspect.py",
    "tools/test_token_shift.py",
    "training/test_adapter_as_model.py",
    "training/test_adapter_kinds.py",
    "training/test_distributed.py",
    "training/test_evaluate_later.py",
    "training/test_from_trl.py",
    "training/test_kto.py",
    "training/test_layer_kernels.py",
    "training/test_layout_training.py",
    "training/test_moving_reference.py",
    "training/test_policy_probe.py",
    "training/test_quantised.py",
    "training/test_reference.py",
    "training/test_reference_cache.py",
    "training/test_reference_of_run.py",
    "training/test_router_loss.py",
    "training/test_row_options.py",
    "training/test_script_parts.py",
    "training/test_second_trainer.py",
    "training/test_sequence_parallel.py",
    "training/test_step_zero.py",
    "training/test_tensor_parallel.py",
    "training/test_tiled_mlp.py",
    "training/test_token_tiles.py",
    "training/test_trainable.py",
    "training/test_trainer.py",
    "training/test_trainer_losses.py",
    "training/test_weighing.py",
]


class Comparison(NamedTuple):
    """One comparison with its bound, under the setting that came closest."""

    margin: float
    setting: str
    test: str
    what: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="settings; all that the processor has if absent")
    arguments, of_pytest = parser.parse_known_args()
    names = [name for name in arguments.only or SETTINGS if is_available(SETTINGS[name])]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            start = time.monotonic()
            passed = run(name, Path(folder) / name, of_pytest)
            failed += [] if passed else [name]
            told = "passed" if passed else "FAILED"
            print(f"{name}, {THREADS[name]} threads: {told} in {time.monotonic() - start:.0f} s", flush=True)
        comparisons = closest({name: read(Path(folder) / name) for name in names})
    print(f"\nThe closest of {len(comparisons)} comparisons that depend on rounding:")
    print(f"{'bound / error':>13}  {'setting':8} test, comparison")
    for comparison in comparisons[:SHOWN]:
        print(f"{comparison.margin:13.1f}  {comparison.setting:8} {comparison.test}  {comparison.what}")
    near = [comparison for comparison in comparisons if comparison.margin < SMALLEST_MARGIN]
    if near:
        print(f"{len(near)} are nearer than a factor of {SMALLEST_MARGIN:g}: the code or the bound is wrong.")
    return int(bool(failed or near))


def is_available(setting: dict[str, str]) -> bool:
    """Whether this processor has the instructions; torch does as it is told, and dies of one that is not there."""
    asked = setting.get("ATEN_CPU_CAPABILITY", "default")
    code = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    free = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    own = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True, check=True)
    best = own.stdout.strip()
    return asked == "default" or (best in CAPABILITIES and CAPABILITIES.index(asked) <= CAPABILITIES.index(best))


def run(name: str, folder: Path, of_pytest: list[str]) -> bool:
    threads = str(THREADS[name])
    environment = {**os.environ, **SETTINGS[name], "DPOP_TEST_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    # assertions are rewritten for the hook: the ordinary runs' compiled tests know nothing of it
    for compiled in (ROOT / "tests").rglob("__pycache__/*pytest*.pyc"):
        compiled.unlink(missing_ok=True)
    workers = max(1, (os.cpu_count() or 1) // THREADS[name])
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal", "-p", "margins"]
    command += ["--margins", str(folder), "-o", "enable_assertion_pass_hook=true", *of_pytest]
    return subprocess.run([*command, *(f"tests/{file}" for file in NUMERIC)], cwd=ROOT, env=environment).returncode == 0


def read(folder: Path) -> dict[tuple, dict]:
    """(test, count, what) -> error and bound."""
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {(line["test"], line["count"], line["what"]): line for line in lines}


def closest(found: dict[str, dict[tuple, dict]]) -> list[Comparison]:
    """What depends on rounding, closest first; of a parametrised test's many comparisons the closest alone."""
    by_comparison = defaultdict(dict)
    for setting, lines in found.items():
        for key, line in lines.items():
            by_comparison[key][setting] = line
    best: dict[tuple[str, str], Comparison] = {}
    for (test, _, what), lines in by_comparison.items():
        if len(lines) > 1 and len({line["error"] for line in lines.values()}) == 1:
            continue
        for setting, line in lines.items():
            if line["error"] > 0:
                comparison = Comparison(line["bound"] / line["error"], setting, test, what)
                key = (test.partition("[")[0], what)
                best[key] = min(best.get(key, comparison), comparison)
    return sorted(best.values())


if __name__ == "__main__":
    sys.exit(main())
