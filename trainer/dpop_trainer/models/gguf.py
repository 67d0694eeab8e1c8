"""A base model in one GGUF file, made an ordinary folder once: what trains, exports and serves reads folders.

    models/chat-q4.gguf   ->   models/chat-q4-model/      config, weights in fp32, tokenizer, gguf.json

The weights are the file's rounded values, stored exactly: fp16 scales times small integers need no more than fp32. What
the file says of its tokens is not believed where its own chat template contradicts it: a wrong end of sequence teaches
a model to end its answers with a word that nothing stops at.
"""

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dpop_trainer.data.seams import specials_of
from dpop_trainer.data.source_path import expanded
from dpop_trainer.run_folder.files import flush_folder, move_folder, write_json
from dpop_trainer.settings.model_paths import is_gguf
from dpop_trainer.settings.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SOURCE = "gguf.json"
"""In the folder: which file it was made of. Written last."""


def folder_of_gguf(name_or_path: str) -> str:
    """The folder with the model of a GGUF file, made beside it where it is not there yet; other names as they are.

    Args:
        name_or_path: a path that ends in .gguf, or anything else.

    Raises:
        ValueError: the package gguf is missing, the file is no model that transformers can read, or its folder cannot
            be written.
    """
    if not is_gguf(name_or_path):
        return name_or_path
    path = expanded(name_or_path)
    folder = path.with_name(f"{path.stem}-model")
    source = {"file": path.name, "bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns}
    if find_spec("gguf") is None and _read(folder / _SOURCE) != source:
        raise ValueError(
            f"model_name_or_path: expected the package gguf, to read {path.name}, found none. "
            "pip install 'dpop-kernels[gguf]'."
        )
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # the ranks of a run come here together
            if _read(folder / _SOURCE) != source:
                _make_folder(path, folder, source)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: expected to write the model of {path.name} to {folder}. {error}. Move the file to a "
            "folder that can be written to and has room for its weights in fp32."
        ) from error
    return str(folder)


def ends_turns_with(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The one token that the chat template ends an answer with, where it is not the tokenizer's end of sequence."""
    specials = specials_of(tokenizer)
    end = specials.template_end
    return end if end and end != specials.eos and end in tokenizer.get_vocab() else None


def _make_folder(path: Path, folder: Path, source: dict[str, Any]) -> None:
    if folder.exists() and not (folder / _SOURCE).exists():
        raise ValueError(
            f"model_name_or_path: expected no folder {folder}, where the model of {path.name} is to be written, found "
            "one that was not made of it. Move it away, or name it instead of the file."
        )
    say(f"Making an ordinary model of {path.name}, once: {folder}/")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _convert(path, part)
        write_json(part / _SOURCE, source)
        flush_folder(part)
        move_folder(part, folder, folder.with_name(f".{folder.name}.old"))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where: Any = {"gguf_file": path.name}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **where)
    except Exception as error:  # a file from elsewhere: its reader fails in any way
        raise ValueError(
            f"model_name_or_path: expected a GGUF file with a model that transformers can read, got {str(path)!r}. "
            f"{type(error).__name__}: {error}"
        ) from error
    # ordinary weights: nothing is to take them for rounded ones
    model.is_quantized = False
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)
    end = ends_turns_with(tokenizer)
    if end is not None:
        logger.warning(
            "%s is read with %r as its end of sequence, and its chat template ends a turn with %r, which is taken.",
            path.name,
            tokenizer.eos_token,
            end,
        )
        tokenizer.eos_token = end
    stop = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(stop)
    model.generation_config = GenerationConfig(**stop)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
