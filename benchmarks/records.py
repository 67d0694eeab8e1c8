"""Records: one JSON line per measurement, appended and flushed as it is made, never rewritten."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LEVELS = RESULTS / "levels.jsonl"
"""What `make bench` appends and the report reads."""
GPU = RESULTS / "gpu.jsonl"
"""What `python -m benchmarks.gpu` wrote, appended by hand."""


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line; it is on the disk when this returns, so that an interrupted run keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All records in the order in which they came; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, time: what a figure means nothing without."""
    on_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(threads),
        "threads": threads,
        "load": None if on_gpu else round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
        },
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def version(package: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with "+" where code differs from it; without git what DPOP_COMMIT says, or None."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "*.py", "*.toml")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DPOP_COMMIT")
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def _cpu(threads: int) -> str:
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}, {torch.backends.cpu.get_cpu_capability()}"
