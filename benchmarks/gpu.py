"""Everything on one GPU in one command, the most telling first.

    python -m benchmarks.gpu OUT                under eight minutes on one H100; interrupt it at any time
    python -m benchmarks.gpu OUT --rehearse     the same way through tiny sizes on a CPU, in Triton's interpreter

    OUT/tests-*.txt       the tests marked `gpu` and those of the kernels: correctness here comes before any time
    OUT/levels.jsonl      head, DPO, logits, pair loss: every peer that is installed, side by side
    OUT/gpu_step*         the training step of a Llama-3.2-1B, ours against TRL's (gpu_step.py, where it is present)
    OUT/gpu_head.jsonl    ways through our own head, tile by tile: what chose the launch constants

Records are written as they come. Append OUT/levels.jsonl to benchmarks/results/levels.jsonl and run
`python -m benchmarks.report`.

Beyond torch, triton, transformers and peft it needs datasets, accelerate, numpy and pytest; the peers are the wheels
trl, liger-kernel, cut-cross-entropy, flash-linear-attention (with fla-core, einops) and quack-kernels (with
nvidia-cutlass-dsl, apache-tvm-ffi, torch-c-dlpack-ext). A peer that is not installed is skipped, and recorded so.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.floors import TINY

ROOT = Path(__file__).parents[1]
BUDGET = 460.0
"""Seconds for all of it."""
NUM_HEADLINES = 8
"""Cases that come before the training step, and that peers with a long warm-up take part in."""
SLOW_STARTERS = ("torch.compile", "Liger DPO", "QuACK")
"""Peers that compile or tune for each size, for many seconds."""
KERNEL_TESTS = [
    "tests/kernel/test_fused.py",
    "tests/kernel/test_fused_linear.py",
    "tests/kernel/test_fused_pairs.py",
]
REHEARSED_TESTS = ["tests/kernel/test_elementary.py"]
MOST_FOR_TESTS, MOST_FOR_STEP, LEAST_FOR_STEP = 100.0, 240.0, 45.0
"""Seconds."""


@dataclass
class Clock:
    """The time that is left of the budget."""

    budget: float
    start: float

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if the tests passed and none of our own results was wrong."""
    doc = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=doc[0])
    parser.add_argument("folder", type=Path, help="for the records")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all of it (default {BUDGET:.0f})")
    options = parser.parse_args(arguments)
    sys.path.append(str(ROOT / "trainer"))  # as for what it starts: on a machine that is hired, nothing is installed
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here. Pass --rehearse to run tiny sizes on the CPU.")
    options.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.budget, time.monotonic())
    try:
        passed = run_tests(options.folder, clock, rehearse=options.rehearse)
        right = run_levels(options.folder, clock, rehearse=options.rehearse)
        right &= run_tiles(options.folder, clock, rehearse=options.rehearse)
    except KeyboardInterrupt:
        print(f"Interrupted: what was measured is in {options.folder}")
        return 130
    print(f"{options.budget - clock.left:.0f} s. Tests {'passed' if passed else 'FAILED'}; records in {options.folder}")
    return 0 if passed and right else 1


def run_tests(folder: Path, clock: Clock, *, rehearse: bool) -> bool:
    """Whether the tests that need a GPU pass, and those of the kernels, which run on a GPU where there is one.

    A rehearsal runs one file of kernel tests, interpreted. Tests that the time did not suffice for have not passed.
    """
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        pytest_command += ["-n", "0" if rehearse else "8"]
    selections = [REHEARSED_TESTS] if rehearse else [["tests", "-m", "gpu"], KERNEL_TESTS]
    deadline = clock.left - MOST_FOR_TESTS
    passed = True
    for i, selection in enumerate(selections):
        ended = _run([*pytest_command, *selection], folder / f"tests-{i}.txt", clock.left - deadline)
        print(f"Tests {' '.join(selection)}: {ended}", flush=True)
        passed &= ended == "exit 0"
    return passed


def run_levels(folder: Path, clock: Clock, *, rehearse: bool) -> bool:
    """The planned cases, with the training step after the first of them; whether all of ours are right."""
    from benchmarks.compare import Effort
    from benchmarks.peers import all_peers, ours
    from benchmarks.plan import cases, rehearsal

    device = torch.device("cpu" if rehearse else "cuda")
    planned = rehearsal(device) if rehearse else cases(device)
    peers = all_peers()
    effort = Effort(rounds=1, seconds=0.0, probe=TINY) if rehearse else Effort(rounds=3, seconds=0.8)
    environment = records.environment(device)
    if rehearse:
        environment["device"] += ", interpreted"  # never to be taken for a GPU's figure
    right, chosen = True, ours.BACKEND
    ours.BACKEND = "fused" if rehearse else chosen
    try:
        for i, case in enumerate(planned):
            if i == NUM_HEADLINES:
                run_step(folder, clock, environment, rehearse=rehearse)
            if clock.left <= 0:
                print(f"{case}: skipped, past the budget")
                continue
            is_headline = i < NUM_HEADLINES and not rehearse
            present = {name: peer for name, peer in peers.items() if is_headline or name not in SLOW_STARTERS}
            right &= run_case(case, present, effort, folder / "levels.jsonl", environment)
    finally:
        ours.BACKEND = chosen
    return right


def run_case(case: Any, peers: dict[str, Any], effort: Any, path: Path, environment: dict[str, Any]) -> bool:
    """One case, its records written and printed; whether ours is right."""
    from benchmarks.compare import side_by_side

    right = True
    for name, result in side_by_side(case, peers, effort).items():
        records.append(path, result.record | environment)
        right &= not (name.startswith("dpop-kernels") and ("refused" in result.record or "failed" in result.record))
        print(f"{case}  {name:28} {_line(result.record)}", flush=True)
    vars(case).clear()  # its tensors make room for the next
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return right


def run_step(folder: Path, clock: Clock, environment: dict[str, Any], *, rehearse: bool) -> None:
    """gpu_step.py in a process of its own, where it is present; its lines become records of the level "step".

    It has a rehearsal of its own.
    """
    if rehearse or importlib.util.find_spec("benchmarks.gpu_step") is None or clock.left < LEAST_FOR_STEP:
        return
    command = [sys.executable, "-m", "benchmarks.gpu_step", str(folder)]
    done = len(records.read(folder / "gpu_step.jsonl"))
    print(f"Training step: {_run(command, folder / 'gpu_step.txt', min(MOST_FOR_STEP, clock.left))}")
    for step in records.read(folder / "gpu_step.jsonl")[done:]:
        records.append(folder / "levels.jsonl", step_record(step) | environment)


def step_record(step: dict[str, Any]) -> dict[str, Any]:
    """A trainer's line in gpu_step.jsonl as a record of the level "step"."""
    plan, is_trl = step["plan"], step["candidate"] == "trl"
    record = {
        "level": "step",
        "task": "lora",
        "shape": {
            "name": f"Llama {plan['hidden_size']} x {plan['num_layers']}",
            "pairs": "MetaMath-like",
            "num_pairs": plan["pairs_per_step"],
        },
        "dtype": "bfloat16",
        "peer": "TRL" if is_trl else f"dpop-kernels, {step['candidate']}",
        "peer_version": records.version("trl" if is_trl else "dpop-kernels"),
        "settings": "DPOTrainer" if is_trl else f"DPOPTrainer, layout {step['candidate']}",
    }
    if "median_s" not in step:
        return record | {key: step[key] for key in ("skipped", "failed") if key in step}
    kept = {key: step[key] for key in ("median_s", "p20_s", "p80_s", "tokens_per_s")}
    peak = int((step["peak_mib"] - step["base_mib"]) * 2**20)
    return record | kept | {"peak_bytes": peak, "errors": {}}


def run_tiles(folder: Path, clock: Clock, *, rehearse: bool) -> bool:
    """Our own head's variants and tiles, with what time is left."""
    from benchmarks import gpu_head

    if clock.left <= 0:
        return True
    arguments = [str(folder), "--deadline", str(clock.left)] + ["--rehearse"] * rehearse
    return gpu_head.main(arguments) == 0


def _run(command: list[str], log: Path, seconds: float) -> str:
    """Runs it from the root with its output in `log`; how it ended."""
    search = os.pathsep.join([str(ROOT), str(ROOT / "trainer"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with log.open("w") as file:
        try:
            environment = {**os.environ, "PYTHONPATH": search}
            run = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=max(1, seconds), env=environment
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    return f"exit {run.returncode}"


def _line(record: dict[str, Any]) -> str:
    if "median_s" not in record:
        return next(f"{key}: {record[key]}" for key in ("skipped", "refused", "failed") if key in record)
    memory = f"{record['peak_bytes'] / 2**20:8.0f} MiB"
    return f"{record['median_s'] * 1e3:9.3f} ms {memory}  {record['of_floor']:.0%} of the floor  {record['errors']}"


if __name__ == "__main__":
    sys.exit(main())
