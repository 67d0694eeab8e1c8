"""Models by name or path, with the checks that save a wasted run."""

import logging
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpop_trainer.models.quantised import make_trainable
from dpop_trainer.models.tokenizer_loading import load_chat_template, load_tokenizer, prepare_tokenizer
from dpop_trainer.settings.config import HeadConfig
from dpop_trainer.settings.model_paths import check_local_path
from dpop_trainer.settings.renamed import without_renaming_warnings

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
    """Load what is given by name and put the adapter on.

    Args:
        model: a causal LM, a peft model, or the name or path of one.
        tokenizer: by default loaded from the model's name or path, at the same revision.
        args: the configuration. Where the model is given by name, `model_init_kwargs` go to `from_pretrained`, and the
            dtype is float32 unless they say another, as in TRL: a small learning rate is lost in weights of 16 bits.
        quantization_config: for `from_pretrained`; only for a model given by name.
        peft_config: the adapter to put on.

    Raises:
        ValueError: something cannot be loaded, or an adapter is asked for on a model that has one.
    """
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if isinstance(model, str):
        kwargs.setdefault("dtype", torch.float32)
        kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    else:
        _check_loaded(kwargs, quantization_config)
    if tokenizer is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        tokenizer = load_tokenizer(name, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code)
    prepare_tokenizer(tokenizer, args.pad_token)
    if args.chat_template_path is not None:
        tokenizer.chat_template = load_chat_template(args.chat_template_path)
    loaded: Any = load_model(model, kwargs, quantization_config) if isinstance(model, str) else model
    make_trainable(loaded)
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise ValueError(
                f"peft_config: expected a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}."
            )
        if isinstance(loaded, PeftModel):
            raise ValueError("peft_config: expected None with a model that is a peft model already, got one.")
        with without_renaming_warnings():
            loaded = get_peft_model(loaded, peft_config)
    if isinstance(loaded, PeftModel) and args.gradient_checkpointing:
        loaded.enable_input_require_grads()  # else no gradient reaches the checkpointed blocks' adapters
    return Policy(loaded, tokenizer, loaded.get_input_embeddings().weight.shape[0])


def load_model(
    name_or_path: str, init_kwargs: dict[str, Any] | None = None, quantization_config: Any = None
) -> PreTrainedModel:
    """A causal LM from a hub id or a local folder.

    Raises:
        ValueError: nothing can be loaded from there (says what was tried), or an argument is of no use.
    """
    kwargs = dict(init_kwargs or {})
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype: expected 'float32', 'bfloat16', 'float16' or 'auto', got {dtype!r}.")
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config: expected it once, got it as an argument and in model_init_kwargs. Remove one."
            )
        kwargs["quantization_config"] = quantization_config
    check_local_path(name_or_path, "config.json")
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    except OSError as error:
        raise ValueError(f"model: expected a hub id or a folder with a model, got {name_or_path!r}. {error}") from error
    make_trainable(model)
    return model


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
