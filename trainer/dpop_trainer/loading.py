"""Models and tokenizers by name or path, with the checks that save a wasted run."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpop_trainer.config import HeadConfig
from dpop_trainer.quantised import make_trainable
from dpop_trainer.recipes import recipe_files
from dpop_trainer.renamed import without_renaming_warnings

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


def load_tokenizer(
    name_or_path: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: none is found there.
    """
    if not name_or_path:
        raise ValueError(
            "processing_class: expected a tokenizer, got None, and the model does not say where it came from. Pass the "
            "tokenizer that the model was trained with."
        )
    check_local_path(name_or_path, "")
    try:
        revision = revision or "main"
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"processing_class: expected a tokenizer at {name_or_path!r}, found none. {error}") from error


def load_chat_template(path_or_text: str) -> str:
    """A chat template by name (chatml), from a .jinja file, from another model's tokenizer, or as it stands.

    Raises:
        ValueError: there is no such file or tokenizer, or the tokenizer has no template.
    """
    if "{{" in path_or_text or "{%" in path_or_text:
        return path_or_text
    path = recipe_files().get(f"{path_or_text}.jinja") or Path(path_or_text).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix in (".jinja", ".j2"):
        raise ValueError(f"chat_template_path: expected an existing file, got {path_or_text!r}. Check the path.")
    try:
        template = load_tokenizer(path_or_text).chat_template
    except ValueError as error:
        raise ValueError(
            f"chat_template_path: expected chatml, a .jinja file, a model to take it from, or a template, "
            f"got {path_or_text!r}. {error}"
        ) from error
    if not isinstance(template, str):
        raise ValueError(
            f"chat_template_path: expected a model whose tokenizer has one chat template, got {path_or_text!r}. "
            "Take it from a chat model, or write a .jinja file."
        )
    return template


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, pad_token: str | None = None) -> None:
    """Give it a padding token where it has none (the end of sequence: padding is masked, so any token will do).

    Args:
        tokenizer: changed in place.
        pad_token: the token to pad with, whatever the tokenizer has.

    Raises:
        ValueError: the tokenizer does not know `pad_token`, or has neither a padding nor an end-of-sequence token.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token: expected a token of the tokenizer's vocabulary, got {pad_token!r}. Leave it out: padding "
                "is masked, so any token will do."
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "processing_class: expected a tokenizer with an end-of-sequence token, got one without. Set "
                "tokenizer.eos_token to the token that ends an answer."
            )
        tokenizer.pad_token = tokenizer.eos_token


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


def check_local_path(name_or_path: str, required_file: str) -> None:
    """
    Raises:
        ValueError: the name is that of a local folder, and there is no such folder with this file.
    """
    path = Path(name_or_path)
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    if looks_local and not (path.expanduser() / required_file).exists():
        raise ValueError(
            f"model: expected a folder with {required_file or 'a tokenizer'}, found none at {name_or_path!r}. "
            "Check the path (it is relative to the working directory)."
        )
