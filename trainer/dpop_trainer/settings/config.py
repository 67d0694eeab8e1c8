"""Configurations: transformers' TrainingArguments plus what this trainer needs, under TRL's names where TRL has one."""

import copy
import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import transformers
from accelerate.utils import ParallelismConfig
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from dpop_kernels.backends import BACKENDS, select_backend
from dpop_kernels.losses.divergences import DIVERGENCES, REVERSE_KL
from dpop_kernels.losses.formulas import DEFAULT_LOSS, LOSSES, TRL_NAMES
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.unpaired import UNPAIRED_LOSSES, check_kto_options
from dpop_kernels.losses.weighing import check_ld_alpha
from dpop_kernels.losses.weights import check_options, has_penalty, losses_of_batch, needs_reference, resolve_losses
from dpop_trainer.data.pair_weights import PairWeight
from dpop_trainer.run_folder.private import SecretFreeRepr, without_secrets
from dpop_trainer.settings.config_checks import check_data_fields, check_preference_fields, tile_setting
from dpop_trainer.settings.liger import layers_alone
from dpop_trainer.settings.loss_fields import check_with_losses, option_values
from dpop_trainer.settings.ranges import check_ranges
from dpop_trainer.settings.renamed import (
    can_offload_activations,
    mirror_checkpointing,
    resolve_checkpointing,
    set_checkpointing,
)
from dpop_trainer.settings.trl_fields import TRLFields, check_trl_fields
from dpop_trainer.settings.unknown_keywords import answers_unknown_keywords
from dpop_trainer.settings.without_effect import check_refused, tell_of_no_effect

LAYOUTS = ("auto", "rows", "tree", "packed", "flat")

_BITSANDBYTES_OPTIMIZERS = ("adamw_bnb", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb")


@dataclass(repr=False)
class HeadConfig(SecretFreeRepr, TrainingArguments):
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
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "The name of gradient_checkpointing since transformers 5.24; either is taken."}
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The name of gradient_checkpointing_kwargs since transformers 5.24."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Mixed bf16 precision. Unset: on where the GPU has bf16 and fp16 is off."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace a NaN loss by the running mean in the logs. Hides trouble."}
    )

    # what the command line may give as JSON
    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *dict.fromkeys([*TrainingArguments._VALID_DICT_FIELDS, "activation_checkpointing_kwargs", "model_init_kwargs"])
    ]

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for from_pretrained where the trainer is given a model by name; on the command "
            'line as JSON. Without "dtype" the weights are loaded in float32, as in TRL.'
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model and tokenizer code that comes with the weights."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Padding token, where not the tokenizer's own (or else its end of sequence)."}
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
    tiled_mlp: int | str | None = field(
        default=None,
        metadata={
            "help": "Compute MLPs over tiles of so many tokens, forward and backward: their memory grows neither with "
            "the batch nor with their width. auto: as many as 2 GiB of a GPU hold. Unset, or none: all at once."
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
    on_bad_record: str = field(
        default="error",
        metadata={
            "help": "error refuses data with a record that cannot be used, and names it; skip leaves such records out, "
            "counts them and lists them in skipped_records.jsonl.",
            "choices": ["error", "skip"],
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template for a tokenizer that has none, or another: zephyr (turns end with the model's own "
            "EOS), chatml, a .jinja file, a model's folder or hub id to take it from, or the template itself."
        },
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad batches to a multiple of this many tokens. auto: not at all, as in TRL."}
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "GPUs that run each batch together, every one some of its tokens (Ulysses): for sequences whose "
            "activations one GPU does not hold. It divides the number of GPUs and of attention heads."
        },
    )
    kernel_backend: str = field(
        default="auto",
        metadata={
            "help": f"auto (Triton on a GPU, torch in chunks elsewhere), or by name: {', '.join(BACKENDS)}.",
            "choices": ["auto", *BACKENDS],
        },
    )

    @property
    def row_multiple(self) -> int | None:
        """What the length of rows is rounded up to: `pad_to_multiple_of`, and equal parts of it for the GPUs that run a
        batch together."""
        multiple: Any = self.pad_to_multiple_of
        return multiple if self.sequence_parallel_size == 1 else math.lcm(multiple or 1, self.sequence_parallel_size)

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs that hold every layer between them, by accelerate's ParallelismConfig: `parallelism_config`, or
        `parallelism_config_tp_size` of the launcher's file."""
        config: Any = self.parallelism_config or ParallelismConfig()
        return config.tp_size

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which trackers are given; without secrets at any depth, and with the padding token."""
        return without_secrets({**super().to_dict(), "pad_token": self.pad_token})

    def __getstate__(self) -> dict[str, Any]:
        """A pickle is a file: training_args.bin, in the run's folder and its checkpoints, is one. It has no secrets."""
        return without_secrets(vars(self))

    def __copy__(self) -> "HeadConfig":
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadConfig":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __post_init__(self) -> None:
        check_trl_fields(self)
        check_refused(self)
        check_ranges(self)
        check_data_fields(self)
        self.pad_to_multiple_of = _whole_number("pad_to_multiple_of", self.pad_to_multiple_of)
        self.tiled_mlp = tile_setting(self)
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        if self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            raise ValueError(
                "bf16: expected a GPU that computes in bfloat16, found none. Set bf16 to false, or use_cpu to true."
            )
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch would warn
        _check_optimizer(self.optim)
        _check_backend(self.kernel_backend, self.use_cpu)
        resolve_checkpointing(self)
        if self.use_liger_kernel:
            self.liger_kernel_config = layers_alone(self.liger_kernel_config, use_cpu=self.use_cpu)
        if self.activation_offloading:
            self._offload_activations()
        super().__post_init__()
        mirror_checkpointing(self)
        tell_of_no_effect(self)
        if isinstance(self.model_init_kwargs, str):  # JSON has become a dict by now
            raise ValueError(
                f"model_init_kwargs: expected a mapping, or one as JSON, got {self.model_init_kwargs!r}. "
                """Write '{"attn_implementation": "sdpa"}'."""
            )

    def _offload_activations(self) -> None:
        if self.use_cpu or not torch.accelerator.is_available():
            raise ValueError(
                "activation_offloading: expected a GPU to take activations off, found none: they are in host memory "
                "already. Leave it off here."
            )
        if not can_offload_activations():
            raise ValueError(
                "activation_offloading: expected a transformers that can do it (5.17 can), got "
                f"{transformers.__version__}. Upgrade transformers, or lower per_device_train_batch_size."
            )
        kwargs: Any = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        set_checkpointing(self, True, {**kwargs, "offload": True})


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


def _check_backend(name: str, use_cpu: bool) -> None:
    """Before a model is loaded: the head finds out at the first batch."""
    device = torch.device("cpu" if use_cpu or not torch.cuda.is_available() else "cuda")
    try:
        select_backend(name, device, torch.float32)
    except ValueError as error:
        raise ValueError(f"kernel_{error}") from error


@answers_unknown_keywords()
@dataclass(repr=False)
class SFTConfig(HeadConfig):
    """Configuration of `SFTTrainer`: the fields of `HeadConfig`, with a learning rate for supervised fine-tuning."""

    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate for AdamW."})


@answers_unknown_keywords()
@dataclass(repr=False)
class KTOConfig(HeadConfig):
    """Configuration of `KTOTrainer`: the fields of `HeadConfig`, and those of its loss, as TRL names them.

    Raises:
        ValueError: a value outside its range, named with the remedy.
    """

    train_sampling_strategy: str = field(
        default="sequential",
        metadata={
            "help": "sequential, as in TRL, or random: answers change places within a batch here, of any order.",
            "choices": ["sequential", "random"],
        },
    )
    loss_type: str = field(
        default="kto",
        metadata={"help": "kto, or apo_zero_unpaired, which has no KL term.", "choices": list(UNPAIRED_LOSSES)},
    )
    beta: float = field(default=0.1, metadata={"help": "β > 0: strength of the log-ratios, 1/nat."})
    desirable_weight: float = field(default=1.0, metadata={"help": "What the loss of a desirable answer is times."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "What that of an undesirable one is times."})
    ref_model_offload: bool = field(
        default=False,
        metadata={"help": "Keep a second model's weights in CPU memory; a layer is on the device while it runs."},
    )

    def __post_init__(self) -> None:
        if self.loss_type not in UNPAIRED_LOSSES:
            raise ValueError(f"loss_type: expected one of {', '.join(UNPAIRED_LOSSES)}, got {self.loss_type!r}.")
        if self.train_sampling_strategy not in ("sequential", "random"):
            raise ValueError(
                f"train_sampling_strategy: expected 'sequential' or 'random', got {self.train_sampling_strategy!r}."
            )
        check_kto_options(self.beta, self.desirable_weight, self.undesirable_weight)
        if UNPAIRED_LOSSES[self.loss_type] and self.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size: expected at least 2 with the loss {self.loss_type!r}, whose KL term is "
                f"of prompts with another prompt's answer, got {self.per_device_train_batch_size}."
            )
        super().__post_init__()


@answers_unknown_keywords()
@dataclass(repr=False)
class DPOPConfig(TRLFields, HeadConfig):
    """Configuration of `DPOPTrainer`: the fields of `HeadConfig`, and those of the preference losses.

    Every field of TRL's `DPOConfig` is accepted. Those of `TRLFields` have to keep TRL's default.

    Raises:
        ValueError: a value outside its range, named with the remedy.
    """

    _VALID_DICT_FIELDS = [*HeadConfig._VALID_DICT_FIELDS, "ref_model_init_kwargs"]  # noqa: RUF012 (transformers' own)

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
            "help": "rows (two per pair), tree (one per pair: what the two have in common is computed once), packed "
            "(several pairs per row), flat (all pairs in one row, no padding), or auto: the best that model and device "
            "can run.",
            "choices": list(LAYOUTS),
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill each training batch of a device up to so many positions, padding included, instead of "
            "per_device_train_batch_size pairs. The loss stays the mean over the step's pairs, however many."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "With max_tokens_per_batch: keep pairs of one prompt in one batch, which computes the prompt once "
            "for all of them, and a chosen answer that they have in common."
        },
    )
    loss_type: list[str] | str = field(
        default_factory=lambda: [DEFAULT_LOSS],
        metadata={
            "help": f"One loss or several, to be summed by loss_weights: {', '.join(LOSSES)}. TRL's names are "
            f"understood: {', '.join(f'{theirs} is {ours}' for theirs, ours in TRL_NAMES.items())}; but its "
            "ipo, which divides by lengths, is ipo_norm."
        },
    )
    loss_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight >= 0 for each loss. None: 1 each. A loss of weight 0 is logged, not trained on."},
    )
    beta: float = field(default=0.3, metadata={"help": "β > 0: strength of the log-ratios, 1/nat. The paper: 0.3."})
    dpop_lambda: float = field(
        default=50.0, metadata={"help": "λ >= 0: weight of DPOP's penalty. The paper: 50, range 5 to 500. 0 is DPO."}
    )
    dpop_lambda_warmup_steps: float = field(
        default=0.0,
        metadata={
            "help": "Optimizer steps over which λ rises linearly from 0; below 1, a fraction of all steps. Evaluation "
            "always takes the full λ."
        },
    )
    dpop_dead_zone: float = field(
        default=0.0,
        metadata={
            "help": "τ >= 0, in nats: how far a chosen answer may fall before DPOP's penalty begins. 0 is the paper's "
            "loss; 0.01 keeps the rounding of log-probs that the data bring from deciding the first gradients."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "ε in [0, 0.5): the share of pairs believed to be labelled the wrong way round. Read by "
            f"{', '.join(name for name, loss in LOSSES.items() if 'label_smoothing' in loss.reads)}."
        },
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the blend in loss_type discopop."})
    f_divergence_type: str = field(
        default=REVERSE_KL,
        metadata={
            "help": "What keeps the policy at the reference. Others than the default with "
            f"{', '.join(name for name, loss in LOSSES.items() if loss.takes_divergence)}.",
            "choices": [*DIVERGENCES],
        },
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "α of alpha_divergence: 0 is the forward KL, 1 the reverse."}
    )
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "γ >= 0: the margin between rewards that loss_type simpo asks for."}
    )
    cpo_alpha: float = field(
        default=1.0, metadata={"help": "Weight >= 0 of the likelihood of chosen answers in loss_type cpo."}
    )
    rdpo_alpha: float = field(
        default=0.01, metadata={"help": "α >= 0: what loss_type rdpo takes off a reward for each token."}
    )
    beta_dpo_alpha: float = field(
        default=0.6,
        metadata={"help": "α >= 0, 1/nat: how far loss_type beta_dpo lets β follow the batch's mean margin."},
    )
    beta_dpo_threshold: float = field(
        default=0.0, metadata={"help": "M₀, in nats: the mean margin at which loss_type beta_dpo has β as given."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "LD-DPO: α in [0, 1], by which tokens count in log-ratios from where an answer is longer than its "
            "pair's other one. None: 1, as all others."
        },
    )
    pair_weight: str = field(
        default="weight",
        metadata={
            "help": "What each pair counts in the mean over pairs: weight (the data set's column of that name, where "
            "it has one), score_margin (how much better the chosen answer was scored), or none (all alike).",
            "choices": [*get_args(PairWeight)],
        },
    )
    use_weighting: bool = field(
        default=False,
        metadata={
            "help": "WPO: weigh each pair's loss by how likely its two answers are to the policy, relative to what it "
            "would write itself."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a mixture of experts' load-balancing loss. Unset: what the model's own config says. 0: "
            "not added."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once before training instead of at every step."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per batch of that pass. None: the training or evaluation batch size."}
    )
    ref_cache_dir: str | None = field(
        default="auto",
        metadata={
            "help": "Folder that keeps what that pass computed, for any run with the same tokens and reference. auto: "
            "beside the tokenised data sets; none: keep nothing."
        },
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "from_pretrained's keyword arguments where ref_model is a name (JSON on the command line): dtype, "
            "quantization_config, ... Unset: the policy's dtype and attention."
        },
    )
    ref_model_offload: bool = field(
        default=False,
        metadata={"help": "Keep a second model's weights in CPU memory; a layer is on the device while it runs."},
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Let the reference follow the policy (TR-DPO), its adapter where an adapter is trained."},
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={"help": "α in (0, 1]: the policy's share of the reference at each move. 1 makes it the policy."},
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "Optimizer steps from one move of the reference to the next."}
    )

    chosen_logratio_warning: float | None = field(
        default=10.0,
        metadata={
            "help": "Warn when the chosen answers' mean log-ratio falls below minus this many nats. None: never."
        },
    )

    def __post_init__(self) -> None:
        check_preference_fields(self)
        losses = resolve_losses(self.loss_type, self.loss_weights)
        self.loss_type = list(losses)
        check_with_losses(self, of_batch=losses_of_batch(self.loss_type), has_penalty=has_penalty(self.loss_type))
        if self.loss_weights is not None:
            self.loss_weights = list(losses.values())
        check_options(self.loss_options(), list(losses))
        check_ld_alpha(self.ld_alpha, losses)
        if self.sync_ref_model and not needs_reference(self.loss_type):
            raise ValueError(
                f"sync_ref_model: expected False with loss_type {' '.join(self.loss_type)}, which has no reference, "
                "got True. Leave it out."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {self.layout!r}.")
        super().__post_init__()

    def weights_by_loss(self) -> dict[str, float]:
        """The weight of each loss, by our name for it."""
        return resolve_losses(self.loss_type, self.loss_weights)

    def loss_options(self, dpop_lambda: float | None = None) -> LossOptions:
        """The hyper-parameters as the losses take them, with another λ where one is given."""
        options = LossOptions(**option_values(self, LossOptions._fields))
        return options if dpop_lambda is None else options._replace(dpop_lambda=dpop_lambda)

    def lambda_at(self, step: int, num_steps: int) -> float:
        """λ in training while `step` optimizer steps of `num_steps` are done: a ramp from 0, then `dpop_lambda`.

        It depends on the step alone, so a resumed run goes on where it was. Like a learning rate's warm-up, the first
        step takes 0 (which is DPO) and the one after the warm-up takes all.
        """
        warmup = self.dpop_lambda_warmup_steps
        warmup_steps = math.ceil(warmup * num_steps) if warmup < 1 else warmup
        return self.dpop_lambda if step >= warmup_steps else self.dpop_lambda * step / warmup_steps


def _whole_number(name: str, value: int | str | None) -> int | None:
    """The value of a field that may be "auto" or "none", for no value, or a number that the command line spells out."""
    if value is None or (isinstance(value, str) and value.lower() in ("auto", "none", "null")):
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number or 'auto', got {value!r}.") from None
