"""What is wrong with a local model folder as far as its files say, read before torch and transformers are imported.

Only what those would refuse too is refused here; of a hub id nothing is said.
"""

import json
from pathlib import Path
from typing import Any

from dpop_trainer.data.messages import NO_CHAT_TEMPLATE
from dpop_trainer.data.sample import first_kinds
from dpop_trainer.data.source_path import expanded, json_file
from dpop_trainer.settings.model_paths import ADAPTER_CONFIG, check_model_path, is_adapter_folder

TOKENIZER_CONFIG = "tokenizer_config.json"

# in transformers' order: the first of them that is there is read
_MODEL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.tiktoken", "tekken.json")
# fields of a config.json with which a model's own code, or other files, are loaded
_OTHER_WAYS = ("auto_map", "transformers_weights")
_POINTER = b"version https://git-lfs"


def check_model_folder(name_or_path: str) -> None:
    """Of a local folder with a model or an adapter, that the parts of it are there.

    Raises:
        ValueError: a description is not JSON, the model is no decoder, an adapter's base cannot be told or found, or
            weights or the tokenizer are missing.
    """
    folder = expanded(name_or_path)
    base = adapter_base_of(folder)
    if base is not None:
        check_model_path(base)
        check_model_folder(base)
        _check_weights(folder, _ADAPTER_WEIGHTS)
    elif (folder / "config.json").is_file():
        config = json_object(folder / "config.json")
        if config.get("is_encoder_decoder") is True:
            named = config.get("architectures")
            saved_by = str(named[0]) if isinstance(named, list) and named else ""
            raise ValueError(not_a_decoder(saved_by, config.get("model_type")))
        if any(name in config for name in _OTHER_WAYS):
            return
        _check_weights(folder, _MODEL_WEIGHTS)
        if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
            raise ValueError(
                f"processing_class: expected a tokenizer in {name_or_path!r}, found no file of one. Copy into it "
                f"tokenizer.json and {TOKENIZER_CONFIG} of the model that it was made from."
            )


def check_reads(name_or_path: str, source: str, *, completions: bool = False, has_template: bool = False) -> None:
    """That a JSON file holds pairs, and a model's tokenizer has the chat template that messages need.

    Args:
        name_or_path: the model or the tokenizer.
        source: the pairs; looked at where they are a JSON file.
        completions: prompt and completion are pairs too.
        has_template: one is given to the tokenizer.

    Raises:
        ValueError: it has none, or the first records are no pairs.
    """
    file = json_file(source)
    if file is None:
        return
    kinds = first_kinds(file, completions=completions)
    if "messages" in kinds and not has_template and _lacks_chat_template(expanded(name_or_path)):
        raise ValueError(NO_CHAT_TEMPLATE)


def adapter_base_of(folder: Path) -> str | None:
    """The base model that the adapter in a folder names; None where there is no adapter.

    Raises:
        ValueError: the adapter names no base, or one that is an adapter itself.
    """
    file = folder / ADAPTER_CONFIG
    return named_base(file, str(folder)) if file.is_file() else None


def named_base(config_file: Path, name_or_path: str) -> str:
    """The base model that an adapter's configuration names.

    Args:
        config_file: the adapter_config.json.
        name_or_path: what messages call the adapter.

    Raises:
        ValueError: as `adapter_base_of`.
    """
    base = json_object(config_file).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"model: expected base_model_name_or_path in {config_file}, found none. Add the base model's hub id or "
            "folder."
        )
    if is_adapter_folder(base):
        raise ValueError(
            f"model: expected an adapter on a whole model, got {name_or_path!r}, whose base {base!r} is an adapter "
            "itself: peft would put the one in place of the other. Merge that one with `dpop export`, and name the "
            f"merged model as base_model_name_or_path in {config_file}."
        )
    return base


def json_object(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is not the JSON of an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"model: expected JSON in {file}, got what cannot be read ({error}). Fetch the file anew."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"model: expected a JSON object in {file}, got {type(value).__name__}. Fetch the file anew.")
    return value


def not_a_decoder(saved_by: str, model_type: Any) -> str:
    """The sentence for a checkpoint of a class that writes no text, or not by a decoder alone."""
    return (
        f"model: expected a causal LM, with or without a vision tower, got a checkpoint of {saved_by or 'no class'} "
        f"(model type {model_type}). Name a decoder that writes text."
    )


def has_own_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder has the tokenizer that it was trained with, and not its base alone."""
    return (folder / TOKENIZER_CONFIG).exists()


def _check_weights(folder: Path, names: tuple[str, ...]) -> None:
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"model: expected weights in {folder} ({', '.join(names)}), found none. Fetch the model anew.")
    shards = [found]
    if found.endswith(".index.json"):
        listed = json_object(folder / found).get("weight_map")
        shards = sorted({*map(str, listed.values())} if isinstance(listed, dict) else ())
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(
            f"model: expected the {len(shards)} files of weights that {folder / found} names, found no {absent[0]}. "
            "Fetch the model anew."
        )
    for shard in shards:
        with (folder / shard).open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(
                    f"model: expected weights in {folder / shard}, got Git LFS's pointer to them. In the folder run: "
                    "git lfs pull"
                )


def _lacks_chat_template(folder: Path) -> bool:
    """False also where it cannot be told."""
    if not folder.is_dir():
        return False
    base = adapter_base_of(folder)
    if base is not None and not has_own_tokenizer(folder):
        return _lacks_chat_template(expanded(base))
    if any(folder.glob("*chat_template*")) or (folder / "tekken.json").is_file():
        return False
    config = json_object(folder / TOKENIZER_CONFIG) if has_own_tokenizer(folder) else {}
    return not config.get("chat_template") and "auto_map" not in config and any(folder.glob("*token*"))
