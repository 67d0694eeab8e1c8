"""The fields of TRL's `DPOConfig` that this trainer does not act on: accepted at TRL's default, else refused by name.

A script written for TRL may set any of its fields. What is supported is a field of `DPOPConfig` itself; here is the
rest, each with what to do instead, so that such a script gets an answer and never a TypeError.
"""

from argparse import SUPPRESS
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from dpop_trainer.settings.hints import closest

# field -> what does here what it does in TRL
ALTERNATIVES = {
    "padding_free": "TRL 1.16 ignores it too. Use layout='auto': what the two answers have in common is computed once.",
}

# names that older scripts use -> what to write today
FORMER_NAMES = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "tokenizer": "processing_class",
    "max_prompt_length": "max_length, for prompt and answer together",
    "max_completion_length": "max_length, for prompt and answer together",
    "max_target_length": "max_length, for prompt and answer together",
    "precompute_ref_logps": "precompute_ref_log_probs",
    "dataset": "dataset_name",
    "model": "model_name_or_path",
    "lambda": "dpop_lambda",
    "lambda_dpop": "dpop_lambda",
    "rpo_alpha": "loss_type [dpop, sft] with loss_weights",
}

# names that no field has -> what to do instead
NOT_OFFERED = {
    "group_by_length": "transformers has it as a value: train_sampling_strategy group_by_length.",
    "eos_token": "An answer ends with the tokenizer's own end of sequence; set it there, and save the tokenizer.",
    "bos_token": "Sequences begin as the tokenizer or its chat template says; set it there, and save the tokenizer.",
    "packing": "Pairs share rows where that computes less: layout packed, or flat.",
    "warmup_ratio": "warmup_steps below 1 is a share of all steps.",
    "lora_rank": "It is lora_r, as in TRL.",
}


@dataclass(repr=False)
class TRLFields:
    """Fields that may be mentioned, but not changed: see `ALTERNATIVES`."""

    padding_free: bool = field(default=False, metadata={"help": SUPPRESS})


def check_trl_fields(config: Any) -> None:
    """
    Args:
        config: a configuration dataclass with the fields of `ALTERNATIVES`.

    Raises:
        ValueError: one of them asks for what this trainer does not do; all such are named, each with the alternative.
    """
    refused = []
    for item in fields(config):
        if item.name not in ALTERNATIVES:
            continue
        value = getattr(config, item.name)
        if value != item.default:
            refused.append(f"{item.name}: expected {item.default!r}, got {value!r}. {ALTERNATIVES[item.name]}")
    if refused:
        raise ValueError("\n".join(refused))


def name_hint(name: str, known: Iterable[str], otherwise: str) -> str:
    """A sentence on which field was meant by one that does not exist: its present name, the closest, or `otherwise`."""
    name = name.replace("-", "_")
    if name in FORMER_NAMES:
        return f"It is called {FORMER_NAMES[name]} now."
    if name in NOT_OFFERED:
        return NOT_OFFERED[name]
    close = closest(name, known)
    return f"Did you mean {close!r}?" if close else otherwise
