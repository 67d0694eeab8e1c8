"""Measure a DPOP training step of a 72B model on one GPU: base in 4 bits, LoRA, one pair; beside TRL's DPOTrainer.

    python -m benchmarks.gpu_large OUT                      on an H100 of 80 GB, under five minutes
    python -m benchmarks.gpu_large OUT --shape yi-34b       another size, see SHAPES
    python -m benchmarks.gpu_large OUT --rehearse           a tiny shape through the same code on a CPU

Needs bitsandbytes. The weights are random and made on the device (random_base.py); everything else is the trainer as a
user runs it: DPOPTrainer, its reference by switching the adapter off, its layouts, the head behind lm_head, AdamW,
gradient checkpointing. One pair of two answers of 1024 tokens each, prompt included, which differ in one token. Each
candidate has a process of its own; one JSON record per candidate goes to OUT/gpu_large.jsonl as soon as it is there:
seconds per step, tokens per second, peak memory of each phase, and beside it what benchmarks.scale says.

Running out of memory is a result, and is recorded as one. What there is no time for is recorded as skipped. Where the
first loss is not log 2, or log-probs are not those of the first candidate, no time is reported and the command exits
with 1.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks import scale
from benchmarks.gpu_head import environment
from benchmarks.gpu_step import word_tokenizer
from benchmarks.random_base import linear_bytes, random_base
from benchmarks.shapes import model_size

SHAPES = {
    "qwen-72b": model_size("Qwen-72B"),
    "qwen2.5-72b": model_size("Qwen2.5-72B"),
    "yi-34b": model_size("Yi-34B"),
    "llama-3-8b": model_size("Llama-3-8B"),
    "tiny": scale.ModelSize(320, 64, 128, 3, 4, 2),
}
"""What Smaug-72B, today's 72B, Smaug-34B and an 8B are made of; for rehearsals."""

CANDIDATES = ("rows", "trl", "tree")
"""Two rows per pair, TRL, and the pair as one tree: the most telling first."""
NAMES = {"rows": "DPOP, rows", "tree": "DPOP, tree", "trl": "TRL"}
TABLE = (("qwen-72b", 1024), ("qwen-72b", 8192), ("yi-34b", 8192), ("llama-3-8b", 8192))
"""What the report shows: shape and tokens of each answer with its prompt."""
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    shape: str = "qwen-72b"
    lora_rank: int = 64
    """As in the recipe qwen-72b."""
    num_tokens: int = 1024
    """Of prompt and answer together; an answer is two thirds of it."""
    num_warm_up: int = 1
    num_steps: int = 3
    seconds: float = 280.0
    """For all candidates together."""
    least_seconds: float = 60.0
    """No candidate is begun with less."""
    loss_tolerance: float = 1e-2
    """Of the first loss, which is log 2 where policy and reference are the same."""
    logp_tolerance: float = 2e-3
    """Relative, of the first step's log-prob of the chosen answer: bf16 rounds otherwise in another order."""


REHEARSAL = Plan(
    shape="tiny", lora_rank=4, num_tokens=24, num_steps=2, least_seconds=0.0, loss_tolerance=1e-6, logp_tolerance=1e-5
)


class Phases:
    """Peak memory between marks. On a CPU, where torch's allocator tells nothing, all are None."""

    def __init__(self, device: torch.device) -> None:
        self.peaks: dict[str, float | None] = {}
        self._is_cuda = device.type == "cuda"

    def mark(self, name: str) -> None:
        """What came since the last mark is called `name`; of a phase that comes again, the highest."""
        if not self._is_cuda:
            self.peaks[name] = None
            return
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB
        self.peaks[name] = max(peak, self.peaks.get(name) or 0.0)
        torch.cuda.reset_peak_memory_stats()


class Watch(TrainerCallback):
    """Times each step with the device's queue empty before and after, and ends training when time runs out."""

    def __init__(self, device: torch.device, phases: Phases, deadline: float) -> None:
        self.seconds: list[float] = []
        self.lines: list[dict[str, float]] = []
        self._device, self._phases, self._deadline = device, phases, deadline

    def on_step_begin(self, args, state, control, **kwargs):
        self._phases.mark("before the step")
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self._phases.mark("backward and update")
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)
        if time.monotonic() + self.seconds[-1] > self._deadline:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


def the_pair(plan: Plan) -> dict[str, str]:
    """Words whose two sequences, with an EOS each, have `num_tokens`; one word in the middle of the answer differs."""
    num_answer = 2 * plan.num_tokens // 3
    words = [f"w{3 + i % (SHAPES[plan.shape].vocab_size - 3)}" for i in range(plan.num_tokens - 1)]
    prompt, chosen = words[: plan.num_tokens - num_answer], words[plan.num_tokens - num_answer :]
    rejected = [*chosen]
    rejected[len(chosen) // 2] = "w3"
    return {"prompt": " ".join(prompt), "chosen": " " + " ".join(chosen), "rejected": " " + " ".join(rejected)}


def measure(candidate: str, plan: Plan, device: torch.device, seconds: float) -> dict[str, Any]:
    """One trainer in this process -> step times, memory by phase, tokens per second."""
    from dpop_trainer.models.quantised import four_bit_config
    from peft import LoraConfig

    start = time.monotonic()
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    phases = Phases(device)
    torch.manual_seed(0)
    model: Any = random_base(
        SHAPES[plan.shape],
        four_bit_config(dtype, nested=True),
        device=device,
        dtype=dtype,
        max_length=2 * plan.num_tokens,
        seconds=seconds / 2,
        report=lambda line: print(line, flush=True),
    )
    weights_gib = torch.cuda.memory_allocated() / GIB if is_cuda else None
    phases.mark("weights")
    making_s = time.monotonic() - start
    watch = Watch(device, phases, start + seconds)
    num_steps = plan.num_warm_up + plan.num_steps
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": 1,
            "max_steps": num_steps,
            "learning_rate": 5e-5,
            "lr_scheduler_type": "constant",
            "beta": 0.3,
            "max_length": plan.num_tokens,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": is_cuda,
            "use_cpu": not is_cuda,
            "disable_tqdm": True,
            "dataloader_pin_memory": is_cuda,
            "seed": 0,
        }
        arguments: dict[str, Any] = {
            "model": model,
            "train_dataset": Dataset.from_list([the_pair(plan)] * num_steps),
            "processing_class": word_tokenizer(SHAPES[plan.shape].vocab_size),
            "peft_config": LoraConfig(
                r=plan.lora_rank, lora_alpha=2 * plan.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            "callbacks": [watch],
        }
        if candidate == "trl":
            from trl import DPOConfig, DPOTrainer

            trainer: Any = DPOTrainer(args=DPOConfig(**settings), **arguments)
        else:
            from dpop_trainer import DPOPConfig, DPOPTrainer

            trainer = DPOPTrainer(args=DPOPConfig(**settings, layout=candidate, dpop_lambda=50.0), **arguments)
            _mark_reference(trainer, phases)
        phases.mark("trainer built")
        trainer.train()
    counted = watch.seconds[plan.num_warm_up :]
    if not counted:
        raise TimeoutError(f"{len(watch.seconds)} steps in {seconds:.0f} s, none of which counts")
    return {
        "median_s": statistics.median(counted),
        "all_s": watch.seconds,
        "making_s": making_s,
        "total_s": time.monotonic() - start,
        "tokens_per_s": 2 * plan.num_tokens / statistics.median(counted),
        "weights_gib": weights_gib,
        "phases_gib": phases.peaks,
        "peak_gib": max((peak for peak in phases.peaks.values() if peak is not None), default=None),
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
        "first_loss": watch.lines[0]["loss"],
        "first_chosen_logp": watch.lines[0]["logps/chosen"],
        "computed_ratio": watch.lines[0].get("tokens/computed_ratio"),
    }


def _mark_reference(trainer: Any, phases: Phases) -> None:
    """The policy's forward ends where the reference's begins."""
    compute = trainer.reference.segment_logps

    def marked(*args: Any) -> Any:
        phases.mark("policy's forward")
        logps = compute(*args)
        phases.mark("reference's forward")
        return logps

    trainer.reference.segment_logps = marked


def predict(candidate: str, plan: Plan) -> dict[str, Any]:
    """What the model on paper says of a candidate: GiB by part, and the matrix products of a step."""
    size = SHAPES[plan.shape]
    ends = size.vocab_size * size.hidden_size * (1 if size.tied_embeddings else 2) * 2  # in bf16
    weight_bytes = (linear_bytes(size, nested=True) + ends) / size.num_parameters
    training = scale.Training(
        lora_rank=plan.lora_rank, weight_bytes=weight_bytes, head="logits" if candidate == "trl" else "fused"
    )
    num_answer = 2 * plan.num_tokens // 3
    if candidate == "tree":  # the edit is in the middle: what comes before it is computed once
        num_shared = num_answer // 2
        batch = scale.Batch(1, plan.num_tokens + num_answer - num_shared, 2 * num_answer - num_shared)
    else:
        batch = scale.Batch(2, plan.num_tokens, 2 * num_answer)
    parts = asdict(scale.step_memory(size, training, batch))
    parts["widened"] = 2 * max(inputs * outputs for inputs, outputs in size.linear_shapes)  # one at a time, in bf16
    if candidate == "trl":
        parts["trained"] /= 2  # it keeps the adapter, and so Adam's moments, in bf16
    parts["total"] = sum(parts.values())
    flop = scale.step_flop(size, training, batch).total
    return {"memory_gib": {name: value / GIB for name, value in parts.items()}, "tflop": flop / 1e12}


def wrong(record: dict[str, Any], truth: dict[str, Any], plan: Plan) -> str | None:
    """In what a candidate's numbers are not what they must be; None where they are."""
    if not abs(record["first_loss"] - math.log(2)) <= plan.loss_tolerance:
        return f"the first loss is {record['first_loss']:.6f}, not log 2: policy and reference differ"
    expected = truth["first_chosen_logp"]
    off = abs(record["first_chosen_logp"] - expected) / abs(expected)
    if not off <= plan.logp_tolerance:
        return f"the chosen answer's log-prob differs by {off:.1e} of its value"
    return None


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_large", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for gpu_large.jsonl")
    parser.add_argument("--shape", choices=SHAPES, default=Plan.shape)
    parser.add_argument("--lora_r", type=int, default=Plan.lora_rank, help="rank of the adapter")
    parser.add_argument("--tokens", type=int, default=Plan.num_tokens, help="of each answer with its prompt")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="for all of it")
    parser.add_argument("--rehearse", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("bitsandbytes") is None:
        parser.error("bitsandbytes is not installed. pip install bitsandbytes, or bring its wheel along.")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device here. Pass --rehearse to run a tiny shape on the CPU.")
    plan = Plan(shape=options.shape, lora_rank=options.lora_r, num_tokens=options.tokens, seconds=options.seconds)
    plan = REHEARSAL if options.rehearse else plan
    device = torch.device("cpu" if options.rehearse else "cuda")
    if options.one:
        print(json.dumps(measure(options.one, plan, device, plan.seconds)))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    return compare(plan, options.folder, device, in_this_process=options.rehearse)


def compare(plan: Plan, folder: Path, device: torch.device, *, in_this_process: bool) -> int:
    """All candidates, one after the other; each one's record is written as soon as it is there."""
    deadline = time.monotonic() + plan.seconds
    common = {"case": "large_step", "plan": asdict(plan), "size": asdict(SHAPES[plan.shape]), **environment(device)}
    truth: dict[str, Any] | None = None
    status = 0
    for candidate in CANDIDATES:
        left = deadline - time.monotonic()
        record: dict[str, Any]
        if candidate == "trl" and importlib.util.find_spec("trl") is None:
            record = {"skipped": "TRL is not installed"}
        elif left < plan.least_seconds:
            record = {"skipped": f"{left:.0f} s are left"}
        else:
            try:
                run = measure(candidate, plan, device, left) if in_this_process else in_a_process(candidate, plan, left)
            except Exception as error:  # one that fails must not cost the others their figures
                status |= int(candidate != "trl")  # of the peer, memory that runs out is a result
                record = {"failed": f"{type(error).__name__}: {error}"[-2000:]}
            else:
                truth = truth or run
                found = wrong(run, truth, plan)
                status |= int(found is not None)
                record = run if found is None else {"refused": found}
        line = json.dumps({"candidate": candidate, "predicted": predict(candidate, plan), **record, **common})
        with (folder / "gpu_large.jsonl").open("a") as file:
            file.write(line + "\n")
        print(_in_words(candidate, record, predict(candidate, plan)), flush=True)
    return status


def in_a_process(candidate: str, plan: Plan, seconds: float) -> dict[str, Any]:
    """`measure` where nothing of another trainer is left in memory."""
    command = [sys.executable, "-m", "benchmarks.gpu_large", "unused", "--one", candidate, "--shape", plan.shape]
    command += ["--lora_r", str(plan.lora_rank), "--tokens", str(plan.num_tokens), "--seconds", str(seconds - 10)]
    # a process that holds the GPU nearly full cannot afford holes between blocks
    environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    root = Path(__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=root, env=environ)
    if run.returncode != 0:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        raise RuntimeError("\n".join([*run.stdout.splitlines()[-3:], *lines[-6:]]))
    return json.loads(run.stdout.splitlines()[-1])


def _in_words(candidate: str, record: dict[str, Any], predicted: dict[str, Any]) -> str:
    if "median_s" not in record:
        outcome = next(key for key in ("skipped", "refused", "failed") if key in record)
        return f"{candidate:5} {outcome}: {record[outcome]}"
    peak = "" if record["peak_gib"] is None else f", {record['peak_gib']:.1f} GiB"
    rate = predicted["tflop"] / record["median_s"]
    on_paper = predicted["memory_gib"]["total"]
    return (
        f"{candidate:5} {record['median_s']:.2f} s per step{peak} ({on_paper:.1f} GiB on paper), "
        f"{record['tokens_per_s']:.0f} tokens/s, {rate:.0f} TFLOP/s, weights made in {record['making_s']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
