"""From `ModelArguments` to what a model, its tokenizer and its adapter are made with."""

import logging
from dataclasses import fields, replace
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from dpop_trainer.models.adapters import find_adapter_base
from dpop_trainer.models.gguf import folder_of_gguf
from dpop_trainer.models.quantised import check_bitsandbytes, compute_dtype, four_bit_config
from dpop_trainer.models.tokenizer_loading import load_tokenizer
from dpop_trainer.settings.arguments import ModelArguments
from dpop_trainer.settings.config import HeadConfig
from dpop_trainer.settings.run_inputs import check_bits, model_name
from dpop_trainer.settings.trl_fields import name_hint

logger = logging.getLogger(__name__)


def tokenizer_of(arguments: ModelArguments, config: HeadConfig) -> PreTrainedTokenizerBase:
    """The tokenizer at the model's name and revision.

    Raises:
        ValueError: none is found there.
    """
    name = model_name(arguments)
    base = find_adapter_base(name, {"revision": arguments.model_revision})
    options: Any = {"revision": arguments.model_revision, "trust_remote_code": config.trust_remote_code}
    return load_tokenizer(name, base, **options)


def with_model_folder(arguments: ModelArguments) -> ModelArguments:
    """The same arguments with a folder for each model that is named by its GGUF file; see `folder_of_gguf`."""
    folders: Any = {
        name: folder_of_gguf(getattr(arguments, name))
        for name in ("model_name_or_path", "ref_model_name_or_path")
        if getattr(arguments, name)
    }
    return replace(arguments, **folders)


def init_kwargs(arguments: ModelArguments, config: HeadConfig) -> dict[str, Any]:
    """What `from_pretrained` is given; `config.model_init_kwargs` wins over the flags of the same meaning."""
    kwargs = {
        "revision": arguments.model_revision,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
        "trust_remote_code": config.trust_remote_code or None,
        **(config.model_init_kwargs or {}),  # type: ignore[dict-item]
    }
    return {key: value for key, value in kwargs.items() if value is not None}


def quantization_config(arguments: ModelArguments, config: HeadConfig | None = None) -> Any:
    """A BitsAndBytesConfig, or None for weights as they are.

    Args:
        arguments: what is asked for.
        config: tells by its autocast in which dtype the products are computed; None: in the weights'.

    Raises:
        ValueError: there is no adapter to train on it, bitsandbytes is not installed, or 8 bits are asked for on a CPU.
    """
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return None
    check_bitsandbytes("load_in_4bit" if arguments.load_in_4bit else "load_in_8bit")
    has_adapter = bool(arguments.use_peft or arguments.peft_config) or _is_adapter(arguments)
    check_bits(arguments, has_adapter=has_adapter, has_gpu=torch.cuda.is_available())
    if arguments.load_in_8bit:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)
    return four_bit_config(
        compute_dtype(arguments.dtype, config),
        quant_type=arguments.bnb_4bit_quant_type,
        nested=arguments.use_bnb_nested_quant,
        storage=arguments.bnb_4bit_quant_storage,
    )


def _is_adapter(arguments: ModelArguments) -> bool:
    name = arguments.model_name_or_path
    return name is not None and find_adapter_base(name, {"revision": arguments.model_revision}) is not None


def lora_config(arguments: ModelArguments) -> LoraConfig | None:
    """The adapter, or None where all weights are trained.

    Raises:
        ValueError: `peft_config` holds what is no field of LoraConfig.
    """
    more: Any = arguments.peft_config or {}
    if not (arguments.use_peft or more):
        _warn_of_unused_flags(arguments)
        return None
    known = [item.name for item in fields(LoraConfig) if item.init]
    for name in more:
        if name not in known:
            hint = name_hint(str(name), known, "peft's documentation lists them.")
            raise ValueError(f"peft_config: expected fields of peft's LoraConfig, got {name!r}. {hint}")
    modules = arguments.lora_target_modules
    chosen: dict[str, Any] = {
        "task_type": arguments.lora_task_type,
        "r": arguments.lora_r,
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": arguments.lora_dropout,
        # peft takes this word as text alone, not in a list
        "target_modules": "all-linear" if modules in (None, ["all-linear"]) else modules,
        "modules_to_save": arguments.lora_modules_to_save,
        "use_rslora": arguments.use_rslora,
        "use_dora": arguments.use_dora,
    }
    if arguments.lora_target_parameters is not None:
        chosen["target_parameters"] = arguments.lora_target_parameters
    return LoraConfig(**{**chosen, **more})


def _warn_of_unused_flags(arguments: ModelArguments) -> None:
    """Whoever sets a rank means to train an adapter, and would find out by the memory that all weights take."""
    about_adapter = ("lora_", "use_rslora", "use_dora")
    unused = [
        f"{item.name}={getattr(arguments, item.name)}"
        for item in fields(arguments)
        if item.name.startswith(about_adapter) and getattr(arguments, item.name) != item.default
    ]
    if unused:
        logger.warning(
            "use_peft is off: all weights are trained, and %s has no effect. For LoRA add --use_peft true.",
            ", ".join(unused),
        )
