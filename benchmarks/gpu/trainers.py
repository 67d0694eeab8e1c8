"""A training step as a user runs it, by our trainer or TRL's: the same model, pairs and settings, each step timed."""

import importlib.util
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.gpu.work import Work

BETA = 0.1
GIB = 1 << 30
LOSS, LOGP = 2e-2, 2e-3
"""Largest difference of a step's loss, in bf16, where trainers round in another order and training amplifies it; and
relative, of the first step's log-prob of the chosen answers."""
REHEARSED_LOSS, REHEARSED_LOGP = 1e-4, 1e-5
"""The same in fp32."""


@dataclass(frozen=True)
class Plan:
    """What is trained on, and for how long."""

    pairs: list[dict[str, str]]
    """Of one step after the other."""
    pairs_per_step: int
    vocab_size: int
    max_length: int
    lora_rank: int | None
    """None trains every weight."""
    num_warm_up: int
    """Steps that compile and allocate, and do not count."""

    @property
    def num_steps(self) -> int:
        return len(self.pairs) // self.pairs_per_step


class Watch(TrainerCallback):
    """Each step's time with the device's queue empty before and after, and its peak of memory, by phase where a phase
    is marked; ends training when time runs out."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.seconds: list[float] = []
        self.lines: list[dict[str, float]] = []
        self.peaks: dict[str, float] = {}
        """GiB; nothing on a CPU, of which torch's allocator tells nothing."""
        self._is_cuda, self._deadline = device.type == "cuda", deadline

    def mark(self, name: str) -> None:
        """What came since the last mark is called `name`; of a phase that comes again, the highest peak stays."""
        if self._is_cuda:
            torch.cuda.synchronize()
            self.peaks[name] = max(torch.cuda.max_memory_allocated() / GIB, self.peaks.get(name, 0.0))
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self.mark("before the step")
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.mark("backward and update")
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.3f} s", flush=True)
        if time.monotonic() + self.seconds[-1] > self._deadline:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.lines.append(dict(logs))


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


def pair_of_words(prompt: int, answer: int, edit: int, vocab_size: int, generator: random.Random) -> dict[str, str]:
    """Texts of so many words, the answers' the same but for the one at `edit`."""
    words = [f"w{generator.randrange(4, vocab_size)}" for _ in range(prompt + answer)]
    rejected = words[prompt:]
    rejected[edit] = "w3"
    answers = {"chosen": words[prompt:], "rejected": rejected}
    return {"prompt": " ".join(words[:prompt]), **{side: " " + " ".join(these) for side, these in answers.items()}}


def make_trainer(candidate: str, model: Any, plan: Plan, work: Work, folder: str, **overrides: Any) -> Any:
    """TRL's trainer or, for a layout's name, ours; both train plain DPO."""
    from peft import LoraConfig

    on_gpu = work.device.type == "cuda"
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": plan.pairs_per_step,
        "max_steps": plan.num_steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "beta": BETA,
        "max_length": plan.max_length,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "seed": 0,
        **overrides,
    }
    rank = plan.lora_rank
    lora = rank and LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_list(plan.pairs),
        "processing_class": word_tokenizer(plan.vocab_size),
        "peft_config": lora or None,
    }
    if candidate == "trl":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(args=DPOConfig(**settings), **arguments)
    from dpop_trainer import DPOPConfig, DPOPTrainer

    return DPOPTrainer(args=DPOPConfig(**settings, loss_type="dpo", layout=candidate), **arguments)


def train(candidate: str, model: Any, plan: Plan, work: Work) -> dict[str, Any]:
    """Some steps -> their times, memory by phase, losses, and how much of what the rows hold was computed.

    Raises:
        RuntimeError: the trainer is not installed.
        TimeoutError: no step that counts was made in time.
    """
    if candidate == "trl" and importlib.util.find_spec("trl") is None:
        raise RuntimeError("TRL is not installed")
    watch = Watch(work.device, work.deadline)
    watch.mark("weights")
    weights = torch.cuda.memory_allocated() / GIB if work.device.type == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(candidate, model, plan, work, folder)
        trainer.add_callback(watch)
        if candidate != "trl":
            _mark_reference(trainer, watch)
        watch.mark("trainer built")
        trainer.train()
    counted = watch.seconds[plan.num_warm_up :]
    if not counted:
        raise TimeoutError(f"{len(watch.seconds)} steps before the time was over, none of which counts")
    p20, *_, p80 = statistics.quantiles(counted, n=5, method="inclusive") if len(counted) > 1 else 2 * counted
    last = watch.lines[-1]
    return {
        "median_s": statistics.median(counted),
        "p20_s": p20,
        "p80_s": p80,
        "all_s": watch.seconds,
        "weights_gib": weights,
        "phases_gib": watch.peaks,
        "peak_gib": max((peak for name, peak in watch.peaks.items() if name != "weights"), default=None),
        "losses": [line["loss"] for line in watch.lines],
        "first_chosen_logp": watch.lines[0]["logps/chosen"],
        "computed_ratio": last.get("tokens/computed_ratio"),
        "padding_share": last.get("tokens/padding_share"),
    }


def _mark_reference(trainer: Any, watch: Watch) -> None:
    """The policy's forward ends where the reference's begins."""
    compute = trainer.reference.segment_logps

    def marked(*args: Any) -> Any:
        watch.mark("policy's forward")
        logps = compute(*args)
        watch.mark("reference's forward")
        return logps

    trainer.reference.segment_logps = marked


def checked(fields: dict[str, Any], truth: dict[str, Any] | None, *, rehearse: bool) -> dict[str, Any]:
    """The fields, or `refused` in place of times where they are not what they must be.

    Args:
        fields: from `train`.
        truth: the record of another trainer on the same pairs; None if there is none yet.
        rehearse: whether they are in fp32.
    """
    loss_bound, logp_bound = (REHEARSED_LOSS, REHEARSED_LOGP) if rehearse else (LOSS, LOGP)
    reason = None
    if not abs(fields["losses"][0] - math.log(2)) <= loss_bound:
        reason = f"the first loss is {fields['losses'][0]:.6f}, not log 2: policy and reference differ"
    elif truth is not None and "median_s" in truth:
        # one that was cut has fewer; NaN is within no bound
        differences = [abs(a - b) for a, b in zip(fields["losses"], truth["losses"], strict=False)]
        beyond = [difference for difference in differences if not difference <= loss_bound]
        logp, expected = fields["first_chosen_logp"], truth["first_chosen_logp"]
        if beyond:
            reason = f"losses differ by {max(beyond):.1e}"
        elif not abs(logp - expected) <= logp_bound * abs(expected):
            reason = f"log-probs of the chosen answers differ by {abs(logp / expected - 1):.1e} of their value"
    if reason is None:
        return fields
    return {"refused": reason, "losses": fields["losses"], "first_chosen_logp": fields["first_chosen_logp"]}
