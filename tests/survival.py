"""Runs that are killed at their n-th file operation, twice, and started again: are they the uninterrupted run?

    make test-survival                  20 kills of each kind of run
    python tests/survival.py 5 --seed 3

Each run is a process of its own, forked where the libraries are imported. In it every change of a file that Python
makes (open to write, rename, remove, make a folder) is counted by an audit hook, and the n-th one meets SIGKILL; what
torch and safetensors write by themselves lies between two of these. n is drawn evenly from as many as the uninterrupted
run has. Compared are the weights' bytes and every line of metrics.jsonl but its times. The last lines say how many were
tried and how many stood.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import datasets
import yaml

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from dpop_trainer.cli import main
from ranks import run_alone
from tiny import text_pairs, tiny_llama, word_tokenizer

TIMES = ("per_second", "_runtime", "peak_gib")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

BASE = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5.0e-3,
    "gradient_checkpointing": False,
    "logging_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
    "report_to": "none",
    "use_cpu": True,
}
KINDS = {
    "lora": {"use_peft": True, "lora_dropout": 0.2, "disable_dropout": False},
    "all_weights": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "stream": {"streaming": True, "use_peft": True},
    "skipped": {"on_bad_record": "skip", "use_peft": True},
    "evaluated": {"use_peft": True, "eval_strategy": "steps", "eval_steps": 2},
}


def counted(counter: Path, fatal: int, words: list[str]) -> int:
    """`dpop train` with its changes of files counted; at number `fatal` (from 1) it is killed."""
    number = 0

    def on_event(event: str, details: tuple) -> None:
        nonlocal number
        writes = event == "open" and isinstance(details[0], str) and (details[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES) or str(details[0]).startswith("/dev"):
            return
        number += 1
        if number == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    datasets.config.HF_DATASETS_CACHE = counter.parent / "cache"  # what a killed run has left there is met again
    code = main(words)
    total, number = number, -(10**9)
    counter.write_text(str(total))
    return code


class Bench:
    """A model, pairs and a folder for the runs of one kind."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        tiny_llama().save_pretrained(folder / "model")
        word_tokenizer().save_pretrained(folder / "model")
        lines = [json.dumps(pair) for pair in text_pairs(14)]
        if kind == "skipped":
            lines.insert(5, '{"prompt": "w1"}')
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        values = {**BASE, **KINDS[kind], "model_name_or_path": str(folder / "model")}
        values["dataset_name"] = str(folder / "pairs.jsonl")
        if kind == "evaluated":
            values["eval_dataset_name"] = str(folder / "pairs.jsonl")
        if KINDS[kind].get("precompute_ref_log_probs"):
            values["ref_cache_dir"] = str(folder / "references")
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        self.total = self.run("whole", 0)[1]
        self.expected = self.result("whole")

    def run(self, name: str, fatal: int) -> tuple[int, int, str]:
        """-> exit code, changes of files (0 of a killed one), what was written."""
        counter = self.folder / "counter"
        counter.unlink(missing_ok=True)
        words = ["train", "--config", str(self.folder / "run.yaml"), "--output_dir", str(self.folder / name)]
        code, output = run_alone(counted, counter, fatal, words)
        return code, int(counter.read_text()) if counter.exists() else 0, output

    def result(self, name: str) -> tuple[bytes, list]:
        folder = self.folder / name
        (weights,) = folder.glob("*model.safetensors")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]
        return weights.read_bytes(), kept

    def stands(self, kills: list[int]) -> str | None:
        """Kill at each number in turn, then let it end -> what differs, None if nothing does."""
        name = "killed"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.folder / "references", ignore_errors=True)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        for fatal in kills:
            code, _, output = self.run(name, fatal)
            if code not in (0, -signal.SIGKILL):
                return f"exit code {code} after a kill: {output[-600:]}"
        code, _, output = self.run(name, 0)
        if code != 0:
            return f"exit code {code} at the end: {output[-600:]}"
        weights, lines = self.result(name)
        if weights != self.expected[0]:
            return "other weights"
        different = [pair for pair in zip(lines, self.expected[1], strict=False) if pair[0] != pair[1]]
        if different or len(lines) != len(self.expected[1]):
            return f"another log: {len(lines)} of {len(self.expected[1])} lines, {different[:1]}"
        return None


def survive(kind: str, num_kills: int, seed: int) -> list[str]:
    """-> one line for each that did not stand."""
    generator = random.Random(f"{seed} {kind}")
    fallen = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), kind)
        for _ in range(num_kills):
            kills = [generator.randint(1, bench.total) for _ in range(2)]
            problem = bench.stands(kills)
            if problem is not None:
                fallen.append(f"{kind}, killed at {kills} of {bench.total}: {problem}")
    return fallen


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("num_kills", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    asked = parser.parse_args()
    all_fallen = []
    for one in asked.kinds:
        fallen = survive(one, asked.num_kills, asked.seed)
        print(f"{one}: {asked.num_kills} tried, {asked.num_kills - len(fallen)} stood", flush=True)
        all_fallen += fallen
    print("\n".join(all_fallen))
    sys.exit(bool(all_fallen))
