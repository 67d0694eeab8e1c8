"""Measure a whole LoRA training step on a GPU: this trainer in each of its layouts against TRL's DPOTrainer.

    python -m benchmarks.gpu_step OUT               on an H100, under eight minutes
    python -m benchmarks.gpu_step OUT --rehearse    tiny shapes through the same code on a CPU, in this process

A Llama of Llama-3.2-1B's shape with random weights in bf16, LoRA r = 16 on all linear layers, gradient checkpointing,
16 pairs per step, the reference by switching the adapter off, plain DPO's loss. The pairs are MetaMath-like in shape:
a prompt and an answer of a few hundred tokens together, of which the rejected one has a single token changed. All
trainers get the same pairs in the same order, each in a process of its own. One JSON record per trainer goes to
OUT/gpu_step.jsonl as soon as it is there. Losses and log-probs are held against those in rows first: where they differ
by more than rounding no time is reported, and the command exits with 1.
"""

import argparse
import importlib.util
import json
import random
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

from benchmarks.gpu_head import environment

CANDIDATES = ("rows", "trl", "packed", "flat", "tree")
"""Layouts of ours, and TRL, the most telling first. The first is what the others are compared with."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 16
    num_heads: int = 32
    num_key_value_heads: int = 8
    vocab_size: int = 128256
    tie_embeddings: bool = True
    pairs_per_step: int = 16
    median_prompt_tokens: int = 90
    median_answer_tokens: int = 180
    max_length: int = 1024
    num_warm_up: int = 4
    """Steps that compile and allocate, and do not count."""
    num_steps: int = 12
    """Steps that count."""
    loss_tolerance: float = 2e-2
    """Of each step's loss, in bf16: the trainers round in another order, and training amplifies it."""
    logp_tolerance: float = 2e-3
    """Relative, of the first step's mean log-prob of the chosen answers."""
    seconds_per_candidate: int = 110
    """Its imports and compilation included: one that hangs must not cost all the others their figures."""


REHEARSAL = Plan(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    pairs_per_step=3,
    median_prompt_tokens=8,
    median_answer_tokens=12,
    max_length=128,
    num_warm_up=1,
    num_steps=2,
    loss_tolerance=1e-4,
    logp_tolerance=1e-5,
)

BETA = 0.1


class StepTimes(TrainerCallback):
    """Wall time of each step with the device's queue empty before and after, and what is logged."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.lines: list[dict[str, float]] = []
        self._device = device

    def on_step_begin(self, args, state, control, **kwargs):
        self._wait()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._wait()
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.lines.append(dict(logs))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def word_tokenizer(vocab_size: int) -> Any:
    """One token per word: `wN` for every id but three."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, vocab_size))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def low_edit_pairs(plan: Plan) -> list[dict[str, str]]:
    """Texts for all steps: lengths spread around their medians by a factor, one answer token changed at random."""
    generator = random.Random(0)

    def words(median: int) -> list[str]:
        length = min(round(median * generator.lognormvariate(0, 0.4)) + 2, plan.max_length // 3)
        return [f"w{generator.randrange(3, plan.vocab_size)}" for _ in range(length)]

    pairs = []
    for _ in range((plan.num_warm_up + plan.num_steps) * plan.pairs_per_step):
        prompt, chosen = words(plan.median_prompt_tokens), words(plan.median_answer_tokens)
        rejected = list(chosen)
        edit = generator.randrange(len(chosen))
        rejected[edit] = next(word for word in (f"w{3 + edit}", f"w{4 + edit}") if word != chosen[edit])
        pairs.append(
            {"prompt": " ".join(prompt), "chosen": " " + " ".join(chosen), "rejected": " " + " ".join(rejected)}
        )
    return pairs


def logical_tokens(pairs: list[dict[str, str]]) -> int:
    """Tokens of both whole sequences of each pair, with an EOS each: what a trainer that shares nothing computes."""
    return sum(
        2 * len(pair["prompt"].split()) + len(pair["chosen"].split()) + len(pair["rejected"].split()) + 2
        for pair in pairs
    )


def measure(candidate: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """One trainer in this process -> step times, memory, tokens per second, losses."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    is_cuda = device.type == "cuda"
    tokenizer = word_tokenizer(plan.vocab_size)
    pairs = low_edit_pairs(plan)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_heads,
        num_key_value_heads=plan.num_key_value_heads,
        max_position_embeddings=2 * plan.max_length,
        tie_word_embeddings=plan.tie_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with device:
        model: Any = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16 if is_cuda else torch.float32)
    times = StepTimes(device)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": plan.pairs_per_step,
            "max_steps": plan.num_warm_up + plan.num_steps,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "beta": BETA,
            "max_length": plan.max_length,
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
            "train_dataset": Dataset.from_list(pairs),
            "processing_class": tokenizer,
            "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            "callbacks": [times],
        }
        if candidate == "trl":
            from trl import DPOConfig, DPOTrainer

            trainer: Any = DPOTrainer(args=DPOConfig(**settings), **arguments)
        else:
            from dpop_trainer import DPOPConfig, DPOPTrainer

            trainer = DPOPTrainer(args=DPOPConfig(**settings, loss_type="dpo", layout=candidate), **arguments)
        base = torch.cuda.memory_allocated() if is_cuda else 0
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    counted = times.seconds[plan.num_warm_up :]
    p20, *_, p80 = statistics.quantiles(counted, n=5, method="inclusive")
    tokens = logical_tokens(pairs) / (plan.num_warm_up + plan.num_steps)
    return {
        "median_s": statistics.median(counted),
        "p20_s": p20,
        "p80_s": p80,
        "all_s": times.seconds,
        "logical_tokens_per_step": tokens,
        "tokens_per_s": tokens / statistics.mean(counted),
        "computed_ratio": times.lines[-1].get("tokens/computed_ratio"),
        "padding_share": times.lines[-1].get("tokens/padding_share"),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if is_cuda else None,
        "base_mib": base / 2**20 if is_cuda else None,
        "losses": [line["loss"] for line in times.lines],
        "first_chosen_logp": times.lines[0]["logps/chosen"],
    }


def difference(record: dict[str, Any], truth: dict[str, Any], plan: Plan) -> str | None:
    """In what a trainer's numbers are not those of another beyond rounding; None where they are."""
    loss = max(abs(a - b) for a, b in zip(record["losses"], truth["losses"], strict=True))
    if not loss <= plan.loss_tolerance:
        return f"losses differ by {loss:.1e}"
    expected = truth["first_chosen_logp"]
    logp = abs(record["first_chosen_logp"] - expected) / abs(expected)
    if not logp <= plan.logp_tolerance:
        return f"log-probs of the chosen answers differ by {logp:.1e} of their value"
    return None


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for gpu_step.jsonl")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device here. Pass --rehearse to run tiny shapes on the CPU.")
    plan = REHEARSAL if options.rehearse else Plan()
    device = torch.device("cpu" if options.rehearse else "cuda")
    if options.one:
        print(json.dumps(measure(options.one, plan, device)))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    common = {"case": "training_step", "plan": asdict(plan), **environment(device)}
    truth: dict[str, Any] | None = None
    status = 0
    for candidate in CANDIDATES:
        if candidate == "trl" and importlib.util.find_spec("trl") is None:
            record: dict[str, Any] = {"skipped": "TRL is not installed"}
        else:
            try:
                record = measure(candidate, plan, device) if options.rehearse else in_a_process(candidate, plan)
            except Exception as error:  # one that fails must not cost the others their figures
                status, record = 1, {"failed": f"{type(error).__name__}: {error}"[-2000:]}
            else:
                truth = truth or record
                wrong = difference(record, truth, plan)
                if wrong:
                    status = 1
                    record = {"skipped": wrong, "losses": record["losses"]}
                else:
                    record["speed_against_first"] = truth["median_s"] / record["median_s"]
        line = json.dumps({"candidate": candidate, **record, **common})
        with (options.folder / "gpu_step.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
    return status


def in_a_process(candidate: str, plan: Plan) -> dict[str, Any]:
    """`measure` where nothing of another trainer is left in memory."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", "unused", "--one", candidate]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=plan.seconds_per_candidate, cwd=Path(__file__).parents[1]
    )
    if run.returncode != 0:
        raise RuntimeError(run.stderr[-1500:])
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
