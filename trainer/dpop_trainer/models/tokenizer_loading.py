"""Tokenizers by name or path, ready for pairs. Needs no torch."""

import os
import sys
from typing import TYPE_CHECKING, Any

from dpop_trainer.data.source_path import expanded
from dpop_trainer.models.from_elsewhere import from_elsewhere
from dpop_trainer.settings.model_folder import has_own_tokenizer
from dpop_trainer.settings.model_paths import check_local_path
from dpop_trainer.settings.own_process import hidden
from dpop_trainer.settings.recipes import recipe_files

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def transformers_without_torch() -> None:
    """Import transformers for its tokenizers alone: without torch that takes two seconds instead of seven.

    What it finds missing at its import stays missing for the whole process, so this is for one that loads no model.
    Does nothing where torch or transformers is there already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    advice = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would tell that models are not available
    try:
        with hidden("torch"):
            from transformers import AutoTokenizer  # noqa: F401
    finally:
        if advice is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]


def load_tokenizer(
    name_or_path: str | None,
    base: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to a model; of an adapter without one, its base's.

    Args:
        name_or_path: folder or hub id.
        base: of the model that the adapter there goes on; None: it is a whole model.
        revision: on the hub.
        trust_remote_code: run code that comes with it.

    Raises:
        ValueError: none is found there.
    """
    if not name_or_path:
        raise ValueError(
            "processing_class: expected a tokenizer, got None, and the model does not say where it came from. Pass the "
            "tokenizer that the model was trained with."
        )
    path = expanded(name_or_path)
    if base is not None and path.is_dir() and not has_own_tokenizer(path):
        name_or_path, revision = base, None
    check_local_path(name_or_path, "")
    from transformers import AutoTokenizer

    with from_elsewhere("processing_class: expected a folder or a hub id with a tokenizer", name_or_path):
        load: Any = AutoTokenizer.from_pretrained
        tokenizer = load(name_or_path, revision=revision or "main", trust_remote_code=trust_remote_code)
    longest = tokenizer.model_max_length  # transformers compares lengths with it, in the middle of the data
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise ValueError(
            f"{name_or_path}: expected a tokenizer whose model_max_length is a number, got {longest!r}. Mend "
            "tokenizer_config.json, or download it again."
        )
    return tokenizer


def load_trained_tokenizer(
    name_or_path: str, base: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer saved with a model; of an adapter without one, its base's. It has a padding token.

    Raises:
        ValueError: no tokenizer is found.
    """
    tokenizer = load_tokenizer(name_or_path, base, revision=revision, trust_remote_code=trust_remote_code)
    prepare_tokenizer(tokenizer)
    return tokenizer


def load_generation_config(name_or_path: str) -> "GenerationConfig | None":
    """What lies beside a tokenizer and names the tokens at which the model stops; None where there is none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return None


def load_chat_template(path_or_text: str) -> str:
    """A chat template by name (zephyr, chatml), from a .jinja file, from another model's tokenizer, or as it stands.

    Raises:
        ValueError: there is no such file or tokenizer, or the tokenizer has no template.
    """
    if "{{" in path_or_text or "{%" in path_or_text:
        return path_or_text
    path = recipe_files().get(f"{path_or_text}.jinja") or expanded(path_or_text)
    if path.is_file():
        with from_elsewhere("chat_template_path: expected a Jinja file in UTF-8", path_or_text):
            return path.read_text(encoding="utf-8")
    if path.suffix in (".jinja", ".j2"):
        raise ValueError(f"chat_template_path: expected an existing file, got {path_or_text!r}. Check the path.")
    try:
        template = load_tokenizer(path_or_text).chat_template
    except ValueError as error:
        raise ValueError(
            f"chat_template_path: expected zephyr, chatml, a .jinja file, a model to take it from, or a template, "
            f"got {path_or_text!r}. {error}"
        ) from error
    if not isinstance(template, str):
        raise ValueError(
            f"chat_template_path: expected a model whose tokenizer has one chat template, got {path_or_text!r}. "
            "Take it from a chat model, or write a .jinja file."
        )
    return template


def prepare_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", pad_token: str | None = None, chat_template: str | None = None
) -> None:
    """Give it a padding token where it has none (the end of sequence: padding is masked, so any token will do).

    Args:
        tokenizer: changed in place.
        pad_token: the token to pad with, whatever the tokenizer has.
        chat_template: what `load_chat_template` takes, in place of the tokenizer's own.

    Raises:
        ValueError: the tokenizer does not know `pad_token`, or has neither a padding nor an end-of-sequence token, or
            there is no such template.
    """
    if chat_template is not None:
        tokenizer.chat_template = load_chat_template(chat_template)
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
