"""`dpop pairs build` and `dpop pairs inspect` on many synthetic problems: seconds, and memory at its peak.

    python -m benchmarks.pairs_scale --num_pairs 1000000 --tokenizer gpt2

Writes worked problems as JSONL, builds pairs from them and examines those, each as a user would: as a process of its
own, one thread. One line per run is appended to benchmarks/results/pairs_scale.jsonl.

Memory is told apart: what a process allocated (anonymous), and that with the pages of files that it has mapped, which
the system takes back whenever it needs them.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpop_trainer.run_folder.versions import versions

RESULTS = Path(__file__).parent / "results" / "pairs_scale.jsonl"
NAMES = ("Ana", "Ben", "Chi", "Dov", "Eli", "Fay", "Gus", "Hal")
_SAMPLING_SECONDS = 0.05
THINGS = ("clips", "eggs", "books", "pens", "coins", "cards", "stamps", "shells")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pairs", type=int, default=100_000)
    parser.add_argument("--tokenizer", help="folder or hub id; without, the doctor measures characters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, pairs = Path(folder) / "problems.jsonl", Path(folder) / "pairs.jsonl"
        write_problems(source, options.num_pairs)
        build = ["build", "metamath", "--source", str(source), "--out", str(pairs)]
        inspect = ["inspect", str(pairs), "--out", str(Path(folder) / "report"), "--exit_zero"]
        if options.tokenizer:
            inspect += ["--tokenizer", options.tokenizer]
        # nothing that an earlier run has cached
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(Path(folder) / "cache"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        record = {
            "num_pairs": options.num_pairs,
            "tokenizer": Path(options.tokenizer).name if options.tokenizer else None,
            "build": measure(build, environment),
            "source_mb": source.stat().st_size / 1e6,
            "pairs_mb": pairs.stat().st_size / 1e6,
            "inspect": measure(inspect, environment),
            "cache_mb": sum(file.stat().st_size for file in (Path(folder) / "cache").rglob("*.arrow")) / 1e6,
            "versions": versions(),
        }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as out:
        out.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=2))


def write_problems(path: Path, num_problems: int) -> None:
    """Problems of two to five steps, all different, as GSM8K writes them."""
    rng = random.Random(0)
    with path.open("w") as out:
        for number in range(num_problems):
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            total = rng.randrange(2, 90)
            question = [f"Problem {number}. {name} has {total} {thing}."]
            steps = []
            for _ in range(rng.randrange(2, 6)):
                more = rng.randrange(2, 90)
                question.append(f"Then {rng.choice(NAMES)} brings {more} more {thing}.")
                steps.append(f"Now there are {total}+{more} = <<{total}+{more}={total + more}>>{total + more} {thing}.")
                total += more
            question.append(f"How many {thing} are there?")
            record = {"question": " ".join(question), "answer": "\n".join([*steps, f"#### {total}"])}
            out.write(json.dumps(record) + "\n")


def measure(arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run `dpop pairs` in a process of its own -> seconds (clock and processor) and MiB at its peak."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "dpop_trainer", "pairs", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # looked at while it runs: the peak that wait4 tells is at least that of the process that started it
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        time.sleep(_SAMPLING_SECONDS)
    seconds, cpu_seconds = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    if status:
        raise SystemExit(f"{' '.join(command)}: expected exit code 0, got {os.waitstatus_to_exitcode(status)}.")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "anonymous_mib": round(peaks["RssAnon"] / 1024),
        "peak_mib": round(peaks["VmHWM"] / 1024),
    }


if __name__ == "__main__":
    main()
