"""Models as they are used after training: a folder or hub id, full weights or an adapter on its base, ready to run."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from dpop_trainer.data.source_path import expanded
from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.loading import load_adapter, load_model
from dpop_trainer.models.tokenizer_loading import load_trained_tokenizer

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


class TrainedModel(NamedTuple):
    """A model in evaluation mode with its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase


def load_trained(
    name_or_path: str,
    *,
    init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    device: str | None = None,
    base: str | None = None,
    widen: bool = False,
) -> TrainedModel:
    """A whole model, or an adapter on its base without merging, in evaluation mode.

    The embedding keeps the base's size, padding rows included: base and adapter then normalise over the same rows.

    Args:
        name_or_path: folder or hub id of a model or of an adapter.
        init_kwargs: for from_pretrained of the base; with `device_map` the model stays where that puts it.
        quantization_config: loads the base quantised.
        device: where to put it; by default the GPU if there is one.
        base: puts an adapter on this model instead of the one that it names.
        widen: of a quantised base, keep the rounded values and store them as ordinary weights again.

    Raises:
        ValueError: the model, the adapter or a tokenizer cannot be loaded.
    """
    init_kwargs = dict(init_kwargs or {})
    _check_device(device)
    if quantization_config is not None and device is not None:
        init_kwargs.setdefault("device_map", {"": device})  # where it is rounded, and stays
    named_base = adapter_base(name_or_path, init_kwargs.get("revision"))
    base = named_base and (base or named_base)
    tokenizer = load_trained_tokenizer(name_or_path, base)
    if base is None:
        model: Any = load_model(name_or_path, init_kwargs, quantization_config)
    else:
        model = load_adapter(
            name_or_path, base, init_kwargs, quantization_config, num_tokens=len(tokenizer), widen=widen
        )
    if "device_map" not in init_kwargs and quantization_config is None:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainedModel(model.eval(), tokenizer)


def _check_device(device: str | None) -> None:
    """
    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # of a build without CUDA, an assertion
        raise ValueError(
            f"device: expected one of this machine (cpu, cuda, cuda:1, mps), got {device!r}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def read_run_config(run: Path) -> dict[str, Any]:
    """config.yaml of a run; of one of its checkpoints, that of the folder above. Empty where there is none.

    Raises:
        ValueError: it is not a mapping.
    """
    path = run_file(run, "config.yaml")
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected the run's configuration as YAML, got what cannot be read ({error})."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of fields to values, got {type(values).__name__}.")
    return values


def run_file(run: Path, name: str) -> Path | None:
    """A file that a run left in its folder; for a checkpoint of it, in the folder above. None where there is none."""
    folders = [run, run.parent] if run.name.startswith("checkpoint-") else [run]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def fingerprint(name_or_path: str, revision: str | None = None) -> str:
    """A short text that changes when the weights behind a name do: file sizes and times, an adapter's base included.

    Of a hub id it is the name and the revision: that a branch has moved on cannot be seen without asking the hub.
    """
    path = expanded(name_or_path)
    if not path.is_dir():
        return f"{name_or_path}@{revision or 'main'}"
    files = sorted(file for pattern in WEIGHT_FILES for file in path.glob(pattern) if _is_weights(file))
    parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    base = adapter_base(name_or_path)
    if base is not None:
        parts.append(fingerprint(base))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_weights(file: Path) -> bool:
    return file.suffix != ".json" or file.name in ("config.json", "adapter_config.json", "tokenizer.json")
