"""Measure a whole training step on a CPU: this trainer against TRL's DPOTrainer, each in its own process.

    python -m benchmarks.cpu_step OUT.jsonl --pairs pairs.jsonl --tokenizer gpt2
    python -m benchmarks.cpu_step OUT.jsonl                 MetaMath-like pairs of random words, nothing to bring along
    python -m benchmarks.cpu_step OUT.jsonl --pairs pairs.jsonl --model FOLDER     a pretrained model and its tokenizer
    python -m benchmarks.cpu_step OUT.jsonl ... --bf16                             under bf16 autocast

A Llama of hidden size 256, 4 layers, intermediate 768 with the tokenizer's vocabulary and random weights, LoRA r = 16
on all linear layers, 4 pairs per step, fp32, no gradient checkpointing, reference by switching the adapter off. Both
trainers get the same pairs in the same order and plain DPO's loss, whose values must agree before a time is reported.
`--pairs` is what `dpop pairs build metamath` writes from GSM8K. TRL takes part where it is installed. A step's time is
the minimum over the steps after the first; memory is the peak of the resident set, of which "base" was there before
training. `bench_step.py` runs the same processes, in turns. With a pretrained model there are 8 pairs per step, and
each trainer's matrix products are run again by themselves: what its step would take if it did nothing else. bf16 is
worth its while where the processor multiplies in it (AVX512-BF16, AMX).
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from datasets import Dataset
from dpop_trainer.batches.layouts import Layout
from transformers import TrainerCallback

from benchmarks.cpu_head import machine
from benchmarks.measure import peak_resident_bytes
from benchmarks.products_alone import Products
from benchmarks.shapes import METAMATH, make_pairs

NUM_STEPS = 4
PAIRS_PER_STEP = 4
PAIRS_PER_STEP_OF_A_MODEL = 8
BETA = 0.1
# fp32 sums of log-probs over a few hundred tokens, times β
LARGEST_LOSS_DIFFERENCE = 1e-4
# bf16 moves a logit of 16, and so a log-prob, by up to 2^-5, 0.018 in the mean square: two answers of a hundred tokens,
# under policy and reference, at random √400 times that; times β and the loss's slope of a half, over the √8 pairs of a
# step, 0.0064. Three of those
LARGEST_LOSS_DIFFERENCE_BF16 = 0.02
VOCAB_SIZE = 50257
"""GPT-2's; of the random words too."""
TRL, TRL_ON_GPU = "trl", "trl, answers alone"
"""On a CPU TRL 1.16 scores every position, prompts and padding too; on a GPU the answers' tokens alone. The second is
the first with that choice made as on a GPU; its tiles are folded by torch's operations in either."""
CANDIDATES = (*(name for name in get_args(Layout) if name != "auto"), TRL, TRL_ON_GPU)
"""Our layouts that train on a CPU, and TRL."""


class Source(NamedTuple):
    """Of what a step is measured; by itself, random words and weights."""

    pairs: str | None = None
    tokenizer: str | None = None
    model: str | None = None
    """A pretrained one, with its own tokenizer."""
    bf16: bool = False
    """Under bf16 autocast."""

    @property
    def pairs_per_step(self) -> int:
        return PAIRS_PER_STEP if self.model is None else PAIRS_PER_STEP_OF_A_MODEL

    @property
    def num_steps(self) -> int:
        """One more where products are written down, which is not timed."""
        return NUM_STEPS + (self.model is not None)

    def argv(self) -> list[str]:
        given = {f"--{name}": value for name, value in self._asdict().items() if value}
        return [word for name, value in given.items() for word in ((name,) if value is True else (name, value))]


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.products = Products()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= NUM_STEPS:
            self.products.__enter__()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step <= NUM_STEPS:
            self.seconds.append(time.perf_counter() - self._start)
        else:
            self.products.__exit__(None, None, None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def workload(source: Source) -> tuple[list[dict[str, Any]], Any]:
    """Enough pairs for all steps, and the tokenizer; without a path, MetaMath-like pairs of random words."""
    num_pairs = source.num_steps * source.pairs_per_step
    if source.pairs is None:
        tokenizer = word_tokenizer(VOCAB_SIZE)

        def text(ids: list[int]) -> str:
            return "".join(f" w{token_id}" for token_id in ids)

        # the first ids are the special tokens
        pairs = make_pairs(METAMATH, num_pairs, VOCAB_SIZE - 2)
        return [dict(zip(("prompt", "chosen", "rejected"), map(text, pair), strict=True)) for pair in pairs], tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer or source.model)
    with open(source.pairs) as file:
        lines = [json.loads(next(file)) for _ in range(num_pairs)]
    return [{key: line[key] for key in ("prompt", "chosen", "rejected")} for line in lines], tokenizer


def model_of(source: Source, vocab_size: int) -> Any:
    """Pretrained, or with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if source.model is not None:
        return AutoModelForCausalLM.from_pretrained(source.model, dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=2048,
        )
    )


def word_tokenizer(vocab_size: int) -> Any:
    """One token for each of the words w0, w1, ..., so that pairs of ids can be written as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(vocab_size - 2))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def measure(candidate: str, source: Source) -> dict[str, Any]:
    """One trainer in this process -> step time, memory, losses."""
    from peft import LoraConfig

    records, tokenizer = workload(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = model_of(source, len(tokenizer))
    times = _StepTimes()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": source.pairs_per_step,
            "max_steps": source.num_steps,
            "learning_rate": 1e-4,
            "beta": BETA,
            "max_length": 1024,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": source.bf16,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 0,
        }
        arguments: dict[str, Any] = {
            "model": model,
            "train_dataset": Dataset.from_list(records),
            "processing_class": tokenizer,
            "peft_config": lora,
            "callbacks": [times],
        }
        if candidate in (TRL, TRL_ON_GPU):
            from trl import DPOConfig, DPOTrainer
            from trl.trainer import utils

            if candidate == TRL_ON_GPU:
                utils._use_triton = lambda device: True
            trainer: Any = DPOTrainer(args=DPOConfig(**settings), **arguments)
        else:
            from dpop_trainer import DPOPConfig, DPOPTrainer

            layout: dict[str, Any] = {} if candidate == "auto" else {"layout": candidate}
            trainer = DPOPTrainer(args=DPOPConfig(**settings, loss_type="dpo", **layout), **arguments)
        base = peak_resident_bytes() / 2**20
        trainer.train()
    found = {
        "candidate": candidate,
        "seconds_per_step": min(times.seconds[1:]),
        "all_seconds": times.seconds,
        "losses": times.losses,
        "peak_mib": peak_resident_bytes() / 2**20,
        "base_mib": base,
    }
    if source.model is not None:
        found["products_seconds"] = times.products.seconds_alone()
    return found


def run_process(candidate: str, source: Source | None = None) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed; its messages are on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.cpu_step", "-", "--one", candidate, *(source or Source()).argv()]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def loss_difference(records: list[dict[str, Any]]) -> float:
    """Largest difference of any step's loss from the first record's; infinite for NaN, which `max` would pass over."""
    first = records[0]["losses"]
    pairs = [pair for record in records for pair in zip(record["losses"], first, strict=True)]
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu_step", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON lines; records are appended")
    parser.add_argument("--pairs", help="JSONL of prompt, chosen, rejected; without it, random words")
    parser.add_argument("--tokenizer", help="folder or hub id, with --pairs")
    parser.add_argument("--model", help="folder or hub id of a pretrained model with its tokenizer, with --pairs")
    parser.add_argument(
        "--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES, metavar="NAME", help=f"of {CANDIDATES}"
    )
    parser.add_argument("--bf16", action="store_true", help="compute under bf16 autocast; weights stay fp32")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    source = Source(options.pairs, options.tokenizer, options.model, options.bf16)
    if (source.pairs is None) != (source.tokenizer is None and source.model is None):
        parser.error("expected --pairs with --tokenizer or --model, got one of them.")
    if options.one:
        print(json.dumps(measure(options.one, source)))
        return 0
    records = []
    for candidate in options.candidates:
        if candidate in (TRL, TRL_ON_GPU) and importlib.util.find_spec("trl") is None:
            print(f"{candidate:20} skipped: TRL is not installed")
            continue
        record = run_process(candidate, source)
        alone = f", {record['products_seconds']:.2f} of products" if "products_seconds" in record else ""
        seconds, memory = record["seconds_per_step"], record["peak_mib"]
        print(f"{candidate:20} {seconds:6.2f} s/step{alone}  {memory:6.0f} MiB peak", flush=True)
        records.append(record)
    difference = loss_difference(records)
    if not difference <= (LARGEST_LOSS_DIFFERENCE_BF16 if source.bf16 else LARGEST_LOSS_DIFFERENCE):
        print(f"The trainers' losses differ by {difference:.1e}: nothing is recorded.", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pairs = "GSM8K low-edit" if source.pairs else METAMATH.name
    common = {"benchmark": "cpu_step", "pairs": pairs, "largest_loss_difference": difference, **machine()}
    if source.model is not None:
        common["model"] = Path(source.model).name
    if source.bf16:
        common["precision"] = "bf16"
    with options.out.open("a") as file:
        for record in records:
            file.write(json.dumps({**common, **record}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
