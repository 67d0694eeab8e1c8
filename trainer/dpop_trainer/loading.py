"""Models and tokenizers by name or path, with the checks that save a wasted run."""

from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class Policy(NamedTuple):
    """What a trainer trains, ready: the model (wrapped for peft where asked), its tokenizer, its vocabulary's size."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int


def prepare_policy(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    init_kwargs: dict[str, Any] | str | None = None,
    quantization_config: Any = None,
    peft_config: PeftConfig | None = None,
    gradient_checkpointing: bool = False,
    chat_template_path: str | None = None,
) -> Policy:
    """Load what is given by name and put the adapter on.

    Raises:
        ValueError: something cannot be loaded, or an adapter is asked for on a model that has one.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
    prepare_tokenizer(tokenizer)
    if chat_template_path is not None:
        tokenizer.chat_template = load_chat_template(chat_template_path)
    loaded: Any = load_model(model, init_kwargs, quantization_config) if isinstance(model, str) else model
    if peft_config is not None:
        if isinstance(loaded, PeftModel):
            raise ValueError("peft_config: expected None with a model that is a peft model already, got one.")
        loaded = get_peft_model(loaded, peft_config)
    if isinstance(loaded, PeftModel) and gradient_checkpointing:
        loaded.enable_input_require_grads()  # else no gradient reaches the checkpointed blocks' adapters
    return Policy(loaded, tokenizer, loaded.get_input_embeddings().weight.shape[0])


def load_model(
    name_or_path: str, init_kwargs: dict[str, Any] | str | None = None, quantization_config: Any = None
) -> PreTrainedModel:
    """A causal LM from a hub id or a local folder.

    Raises:
        ValueError: nothing can be loaded from there; says what was tried.
    """
    kwargs = dict(init_kwargs) if isinstance(init_kwargs, dict) else {}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    _check_local_path(name_or_path, "config.json")
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    except OSError as error:
        raise ValueError(f"model: expected a hub id or a folder with a model, got {name_or_path!r}. {error}") from error


def load_tokenizer(name_or_path: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ValueError: none is found there.
    """
    if not name_or_path:
        raise ValueError(
            "processing_class: expected a tokenizer, got None, and the model does not say where it came from. Pass the "
            "tokenizer that the model was trained with."
        )
    _check_local_path(name_or_path, "")
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"processing_class: expected a tokenizer at {name_or_path!r}, found none. {error}") from error


def load_chat_template(path_or_text: str) -> str:
    """A chat template from a .jinja file, from another model's tokenizer, or as it stands.

    Raises:
        ValueError: there is no such file or tokenizer, or the tokenizer has no template.
    """
    if "{{" in path_or_text or "{%" in path_or_text:
        return path_or_text
    path = Path(path_or_text).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix in (".jinja", ".j2"):
        raise ValueError(f"chat_template_path: expected an existing file, got {path_or_text!r}. Check the path.")
    try:
        template = load_tokenizer(path_or_text).chat_template
    except ValueError as error:
        raise ValueError(
            f"chat_template_path: expected a .jinja file, a model to take it from, or a template, "
            f"got {path_or_text!r}. {error}"
        ) from error
    if not isinstance(template, str):
        raise ValueError(
            f"chat_template_path: expected a model whose tokenizer has one chat template, got {path_or_text!r}. "
            "Take it from a chat model, or write a .jinja file."
        )
    return template


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give it a padding token where it has none (the end of sequence: padding is masked, so any token will do).

    Raises:
        ValueError: the tokenizer has neither a padding nor an end-of-sequence token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "processing_class: expected a tokenizer with an end-of-sequence token, got one without. Set "
                "tokenizer.eos_token to the token that ends an answer."
            )
        tokenizer.pad_token = tokenizer.eos_token


def _check_local_path(name_or_path: str, required_file: str) -> None:
    path = Path(name_or_path)
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    if looks_local and not (path.expanduser() / required_file).exists():
        raise ValueError(
            f"model: expected a folder with {required_file or 'a tokenizer'}, found none at {name_or_path!r}. "
            "Check the path (it is relative to the working directory)."
        )
