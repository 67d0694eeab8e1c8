"""Configurations: transformers' TrainingArguments plus what this trainer needs, under TRL's names where TRL has one."""

import importlib.util
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainingArguments

from dpop_kernels.losses import LOSSES, check_hyperparameters

_BITSANDBYTES_OPTIMIZERS = ("adamw_bnb", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb")


@dataclass
class HeadConfig(TrainingArguments):
    """What fine-tuning through the scoring head shares, whatever the loss.

    Every field of `transformers.TrainingArguments` is here too. As in TRL, some of its defaults differ:
    learning_rate 1e-6, logging_steps 10, gradient_checkpointing on, and bf16 on where the GPU has it and fp16 is off.
    `logging_nan_inf_filter` is off: it would hide a NaN, and costs a device sync per micro-batch.

    Raises:
        ValueError: a value outside its range, named with the remedy.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every X optimizer steps; below 1, a fraction of all steps."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in backward: less memory, about a third more time."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Mixed bf16 precision. Unset: on where the GPU has bf16 and fp16 is off."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace a NaN loss by the running mean in the logs. Hides trouble."}
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for from_pretrained where the trainer is given a model by name."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set every dropout to 0, so that policy and reference agree at step 0."},
    )

    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "Keep what gradient checkpointing saves in pinned host memory, not on the GPU: less memory, slower."
        },
    )

    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes for tokenising the data."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt + completion in tokens; longer ones are cut. None: no limit."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "What survives the cut: keep_start (of the completion) or keep_end (of the prompt)."},
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this many tokens."}
    )
    kernel_backend: str = field(
        default="auto",
        metadata={
            "help": "auto (Triton on a GPU, chunked torch elsewhere), fused, chunked or reference.",
            "choices": ["auto", "fused", "chunked", "reference"],
        },
    )

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode: expected 'keep_start' or 'keep_end', got {self.truncation_mode!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length: expected None or at least 2 tokens, got {self.max_length}.")
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch would warn
        _check_optimizer(self.optim)
        if self.activation_offloading:
            self._offload_activations()
        super().__post_init__()

    def _offload_activations(self) -> None:
        if self.use_cpu or not torch.accelerator.is_available():
            raise ValueError(
                "activation_offloading: expected a GPU to take activations off, found none: they are in host memory "
                "already. Leave it off here."
            )
        if "offload" not in inspect.signature(PreTrainedModel.gradient_checkpointing_enable).parameters:
            raise ValueError(
                "activation_offloading: expected a transformers that can do it (5.17 can), got "
                f"{transformers.__version__}. Upgrade transformers, or lower per_device_train_batch_size."
            )
        self.gradient_checkpointing = True
        self.gradient_checkpointing_kwargs = {**(self.gradient_checkpointing_kwargs or {}), "offload": True}  # type: ignore[dict-item]


def _check_optimizer(name: Any) -> None:
    """Before any data is read: transformers finds out when training begins."""
    name = str(getattr(name, "value", name))
    if not name.startswith(_BITSANDBYTES_OPTIMIZERS):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"optim: expected an optimizer that can run here, got {name!r}, which needs bitsandbytes, and that is not "
            "installed. pip install bitsandbytes on a machine with a GPU, or use adamw_torch_fused."
        )
    if name.startswith("paged") and not torch.cuda.is_available():
        raise ValueError(
            f"optim: expected an optimizer that can run here, got {name!r}, whose pages are CUDA's unified memory, and "
            "there is no CUDA device. Use adamw_torch_fused."
        )


@dataclass
class SFTConfig(HeadConfig):
    """Configuration of `SFTTrainer`: the fields of `HeadConfig`, with a learning rate for supervised fine-tuning."""

    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate for AdamW."})


@dataclass
class DPOPConfig(HeadConfig):
    """Configuration of `DPOPTrainer`: the fields of `HeadConfig`, and those of the preference losses.

    Raises:
        ValueError: a value outside its range, named with the remedy.
    """

    keep_identical: bool = field(
        default=False,
        metadata={"help": "Keep pairs whose two answers are equal after tokenisation. By default they are left out."},
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "Score the tokens that both answers of a pair begin with once, not twice."}
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "rows (two per pair), tree (one per pair: what the two have in common is computed once), or auto: "
            "the cheaper for each batch where the model can run trees, else rows.",
            "choices": ["auto", "rows", "tree"],
        },
    )
    loss_type: str = field(
        default="dpop",
        metadata={"help": "dpop, dpo (TRL's 'sigmoid'), ipo or slic (TRL's 'hinge').", "choices": sorted(LOSSES)},
    )
    beta: float = field(default=0.3, metadata={"help": "β > 0: strength of the log-ratios, 1/nat. The paper: 0.3."})
    dpop_lambda: float = field(
        default=50.0, metadata={"help": "λ >= 0: weight of DPOP's penalty. The paper: 50, range 5 to 500. 0 is DPO."}
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once before training instead of at every step."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per batch of that pass. None: the training or evaluation batch size."}
    )

    chosen_logratio_warning: float | None = field(
        default=10.0,
        metadata={
            "help": "Warn when the chosen answers' mean log-ratio falls below minus this many nats. None: never."
        },
    )

    def __post_init__(self) -> None:
        if self.chosen_logratio_warning is not None and not self.chosen_logratio_warning > 0:
            raise ValueError(
                f"chosen_logratio_warning: expected nats > 0, or None to switch it off, got "
                f"{self.chosen_logratio_warning}."
            )
        check_hyperparameters(self.beta, self.dpop_lambda)
        if self.loss_type not in LOSSES:
            raise ValueError(
                f"loss_type: expected one of {sorted(LOSSES)}, got {self.loss_type!r}. "
                "TRL's 'sigmoid' is 'dpo' here, its 'hinge' is 'slic'."
            )
        if self.layout not in ("auto", "rows", "tree"):
            raise ValueError(f"layout: expected 'auto', 'rows' or 'tree', got {self.layout!r}.")
        super().__post_init__()
