"""Adapters: the model under one in memory, and the base that one in a folder or on the hub names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from dpop_trainer.data.source_path import expanded
from dpop_trainer.settings.model_folder import named_base
from dpop_trainer.settings.model_paths import ADAPTER_CONFIG, check_trained_path

# peft's inits that change the base by what loading cannot repeat -> what to use instead
_UNREPEATED_INITS = {
    "pissa_niter_": "a random SVD, drawn anew; use 'pissa', which is exact",
    "corda": "it was made from data that the adapter does not keep; use 'olora' or 'pissa'",
    "lora_ga": "it was made from gradients that the adapter does not keep; use 'olora' or 'pissa'",
    "loftq": "it replaces the base by a rounded one; load the base in 4 bits (load_in_4bit) and use the default",
}

_VIRTUAL_TOKENS = (
    "its virtual tokens stand before the text, and log-probs are looked up by place; use PrefixTuningConfig, whose "
    "stand in the attention's cache, or LoRA"
)
_TASKS = "each batch would have to name its task; use LoRA, one adapter per task"

# peft's kinds of adapters that are not trained here -> why, and what to use instead
REFUSED_KINDS = {
    "PROMPT_TUNING": _VIRTUAL_TOKENS,
    "P_TUNING": _VIRTUAL_TOKENS,
    "CPT": _VIRTUAL_TOKENS,
    "MULTITASK_PROMPT_TUNING": _TASKS,
    "POLY": _TASKS,
    "LILY": "it routes by a mean over all tokens of a batch, so that log-probs depend on the other pairs; use LoRA",
    "XLORA": "it runs the model twice in each forward; use LoRA",
}

# of from_pretrained's arguments: what finds a file on the hub
WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def base_model(model: Any) -> Any:
    """The causal LM itself: what peft has wrapped, or the model where it has not. An adapter's layers stay in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_adapter_inside(model: nn.Module) -> bool:
    """Whether layers of a model that is no peft model are an adapter's: transformers put it in, or peft's wrapper is
    off it."""
    if isinstance(model, PeftModel):
        return False
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def check_adapters(configs: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an adapter is of a kind that is not trained here, or begins in a way that is not repeated when it is
            loaded on its base.
    """
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in REFUSED_KINDS:
            raise ValueError(
                f"peft_config: expected an adapter that is trained here, got {type(config).__name__}: "
                f"{REFUSED_KINDS[kind]}."
            )
        init = getattr(config, "init_lora_weights", None)
        for name, why in _UNREPEATED_INITS.items():
            if isinstance(init, str) and init.startswith(name):
                raise ValueError(
                    f"peft_config: expected init_lora_weights that loading the adapter repeats, got {init!r}, which "
                    f"changes the base: {why}. What is trained on it could not be loaded again."
                )


def find_adapter_base(name_or_path: str, init_kwargs: Mapping[str, Any] | None = None) -> str | None:
    """The base model that an adapter names, by folder or hub id; None where there is no adapter.

    Args:
        name_or_path: folder or hub id.
        init_kwargs: from_pretrained's; those that find a file on the hub are heeded.

    Raises:
        ValueError: the adapter names no base, or one that is an adapter itself.
    """
    path = expanded(name_or_path)
    config_file: Path | None
    if path.is_dir():
        config_file = path / ADAPTER_CONFIG
        config_file = config_file if config_file.exists() else None
    else:
        where = {key: value for key, value in (init_kwargs or {}).items() if key in WHERE}
        found = find_adapter_config_file(name_or_path, **where)
        config_file = None if found is None else Path(found)
    if config_file is None:
        return None
    return named_base(config_file, name_or_path)


def adapter_base(name_or_path: str, revision: str | None = None) -> str | None:
    """As `find_adapter_base`; None is a whole model that is there.

    Raises:
        ValueError: a local path with neither a model nor an adapter, a hub id that cannot be had, or an adapter that
            names no base, or one that is an adapter itself.
    """
    check_trained_path(name_or_path)
    base = find_adapter_base(name_or_path, {"revision": revision})
    if base is None and not expanded(name_or_path).is_dir():
        try:
            cached_file(name_or_path, "config.json", revision=revision)
        except OSError as error:
            raise ValueError(
                f"model: expected a folder, or a hub id that the hub or its cache knows, got {name_or_path!r}. {error}"
            ) from error
    return base
