"""Models by name or path, with the checks that save a wasted run."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpop_trainer.models.adapters import WHERE, check_adapters, find_adapter_base, has_adapter_inside
from dpop_trainer.models.auto_class import auto_class
from dpop_trainer.models.dtypes import named_dtype
from dpop_trainer.models.from_elsewhere import from_elsewhere
from dpop_trainer.models.quantised import make_trainable, widened
from dpop_trainer.models.tensor_parallel import (
    check_adapters_beside,
    check_family,
    fit_adapter,
    parallel_kwargs,
    parallel_size,
)
from dpop_trainer.models.tokenizer_loading import load_tokenizer, prepare_tokenizer
from dpop_trainer.run_folder.contents import check_contents
from dpop_trainer.settings.config import HeadConfig
from dpop_trainer.settings.model_paths import adapter_on_adapter, check_model_path
from dpop_trainer.settings.renamed import without_renaming_warnings
from dpop_trainer.settings.under_way import under_way

logger = logging.getLogger(__name__)


class Policy(NamedTuple):
    """What a trainer trains, ready: the model (wrapped for peft where asked), its tokenizer, its vocabulary's size."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int


def prepare_policy(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: HeadConfig,
    *,
    quantization_config: Any = None,
    peft_config: PeftConfig | None = None,
) -> Policy:
    """Load what is given by name and put the adapter on. An adapter by name is loaded on its base, to be trained on.

    Args:
        model: a causal LM, a peft model, or the name or path of one or of an adapter.
        tokenizer: by default loaded from the model's name or path, at the same revision.
        args: the configuration. Where the model is given by name, `model_init_kwargs` go to `from_pretrained`, and the
            dtype is float32 unless they say another, as in TRL: a small learning rate is lost in weights of 16 bits.
        quantization_config: for `from_pretrained`; only for a model given by name.
        peft_config: the adapter to put on.

    Raises:
        ValueError: something cannot be loaded, or an adapter is asked for on a model that has one.
    """
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    base = None
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"peft_config: expected a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}."
        )
    if peft_config is not None:
        check_adapters({"default": peft_config})
    if isinstance(model, str):
        kwargs.setdefault("dtype", torch.float32)
        kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        kwargs = {**parallel_kwargs(args.tensor_parallel_size), **kwargs}
        check_model_path(model)
        base = find_adapter_base(model, kwargs)
        if base is not None and peft_config is not None:
            raise ValueError(adapter_on_adapter(model))
    else:
        _check_loaded(kwargs, quantization_config)
        _check_no_adapter_inside(model)
    if tokenizer is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        options: Any = {"revision": kwargs.get("revision"), "trust_remote_code": args.trust_remote_code}
        tokenizer = load_tokenizer(name, base, **options)
    prepare_tokenizer(tokenizer, args.pad_token, args.chat_template_path)
    loaded: Any = model
    if isinstance(model, str) and base is not None:
        loaded = load_adapter(model, base, kwargs, quantization_config, is_trainable=True)
    elif isinstance(model, str):
        loaded = load_model(model, kwargs, quantization_config)
    make_trainable(loaded)
    if peft_config is not None:
        if isinstance(loaded, PeftModel):
            raise ValueError("peft_config: expected None with a model that is a peft model already, got one.")
        if parallel_size(loaded) > 1:
            check_adapters_beside([peft_config], parallel_size(loaded), are_new=True)
        with without_renaming_warnings():
            loaded = get_peft_model(loaded, peft_config)
    if isinstance(loaded, PeftModel) and parallel_size(loaded) > 1:
        check_adapters_beside(loaded.peft_config.values(), parallel_size(loaded), are_new=False)
        fit_adapter(loaded, is_new=peft_config is not None)
    if isinstance(loaded, PeftModel) and args.gradient_checkpointing:
        loaded.enable_input_require_grads()  # else no gradient reaches the checkpointed blocks' adapters
    return Policy(loaded, tokenizer, loaded.get_input_embeddings().weight.shape[0])


def load_model(name_or_path: str, init_kwargs: dict[str, Any] | None = None, quantization_config: Any = None) -> Any:
    """A causal LM from a hub id or a local folder, of the class that saved it; of an adapter a peft model, the adapter
    on its base, frozen.

    Raises:
        ValueError: nothing can be loaded from there (says what was tried), a run's files are not what it wrote, or an
            argument is of no use.
    """
    kwargs = dict(init_kwargs or {})
    if isinstance(kwargs.get("dtype"), str):
        kwargs["dtype"] = named_dtype(kwargs["dtype"])
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config: expected it once, got it as an argument and in model_init_kwargs. Remove one."
            )
        kwargs["quantization_config"] = quantization_config
    check_model_path(name_or_path)
    base = find_adapter_base(name_or_path, kwargs)
    if base is not None:
        return load_adapter(name_or_path, base, init_kwargs, quantization_config)
    with under_way(f"Reading {name_or_path}"):
        check_contents(name_or_path)
    found_by = {key: kwargs[key] for key in (*WHERE, "subfolder", "gguf_file", "trust_remote_code") if key in kwargs}
    with from_elsewhere("model: expected a hub id or a folder with a model", name_or_path):
        config = kwargs["config"] if "config" in kwargs else AutoConfig.from_pretrained(name_or_path, **found_by)
    if "distributed_config" in kwargs:
        check_family(config, kwargs["distributed_config"].tp_size)
    with from_elsewhere("model: expected a hub id or a folder with a model", name_or_path):
        model, told = auto_class(config).from_pretrained(name_or_path, **kwargs, output_loading_info=True)
    _check_all_loaded(name_or_path, told, kwargs)
    make_trainable(model)
    return model


def _check_all_loaded(name_or_path: str, told: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """transformers draws at random what a checkpoint lacks. What it has and the model does not take, as a head for
    another task, is in transformers' own warning."""
    absent = sorted(told.get("missing_keys") or ())
    if not kwargs.get("ignore_mismatched_sizes"):
        absent += sorted(str(entry[0]) for entry in told.get("mismatched_keys") or ())
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ValueError(
            f"model: expected all weights of {name_or_path!r} in its files, found none that fits for {absent[0]}{more}"
            ", which would be random numbers. Fetch the model anew: a shard or a head is missing, or config.json is of "
            "another model."
        )


def load_adapter(
    name_or_path: str,
    base: str,
    init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    *,
    is_trainable: bool = False,
    num_tokens: int | None = None,
    widen: bool = False,
) -> PeftModel:
    """An adapter on its base, not merged.

    Args:
        name_or_path: folder or hub id of the adapter.
        base: of the model that it goes on.
        init_kwargs: for from_pretrained of the base; a revision is the adapter's, the base has its own.
        quantization_config: loads the base quantised.
        is_trainable: the adapter's parameters take a gradient.
        num_tokens: the base's embedding gets at least so many rows, which the adapter was trained with.
        widen: of a quantised base, keep the rounded values and store them as ordinary weights again.

    Raises:
        ValueError: the base or the adapter cannot be loaded, or the one does not go on the other.
    """
    kwargs = dict(init_kwargs or {})
    where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    kwargs.pop("revision", None)
    with under_way(f"Reading {name_or_path}"):
        check_contents(name_or_path)
    model = load_model(base, kwargs, quantization_config)
    if widen and quantization_config is not None:
        model = widened(model)
    if num_tokens is not None and num_tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(num_tokens)
    with (
        from_elsewhere(f"model: expected an adapter that goes on its base {base!r}", name_or_path),
        without_renaming_warnings(),
    ):
        adapted = PeftModel.from_pretrained(model, name_or_path, is_trainable=is_trainable, **where)
    if parallel_size(adapted) > 1:
        fit_adapter(adapted, is_new=False)
    return adapted


def _check_no_adapter_inside(model: Any) -> None:
    if has_adapter_inside(model):
        raise ValueError(
            f"model: expected a whole model or a peft model, got a {type(model).__name__} with an adapter's layers in "
            "it (loaded by AutoModelForCausalLM from an adapter, or taken out of peft's wrapper), which is not saved "
            "as it is trained. Pass the adapter by name, or peft's PeftModel.from_pretrained(base, adapter, "
            "is_trainable=True); to train a new adapter, merge the old one first (merge_and_unload)."
        )


def _check_loaded(init_kwargs: dict[str, Any], quantization_config: Any) -> None:
    """A model that is loaded already takes no arguments for loading."""
    if quantization_config is not None:
        raise ValueError(
            "quantization_config: expected None with a model that is loaded already, got one. Pass the model by name, "
            "or load it with this configuration."
        )
    if init_kwargs:
        logger.warning(
            "model_init_kwargs: %s have no effect, the model being loaded already; pass the model by name.",
            sorted(init_kwargs),
        )


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout to zero: modules, and numbers that a module hands to its attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
