"""Names of models that can be seen to be wrong without loading anything."""

from pathlib import Path

from dpop_trainer.data.source_path import expanded, looks_local

ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER_CONFIG)


def is_gguf(name_or_path: str) -> bool:
    """Whether the name is that of a model in one GGUF file that is there."""
    return name_or_path.endswith(".gguf") and expanded(name_or_path).is_file()


def check_model_path(name_or_path: str) -> None:
    """
    Raises:
        ValueError: the name is that of a local folder, and there is no such folder with a model or an adapter.
    """
    if is_gguf(name_or_path):
        folder_name = f"{Path(name_or_path).stem}-model"
        raise ValueError(
            f"model: expected a folder with {' or '.join(MODEL_FILES)}, got the file {name_or_path!r}. `dpop train` "
            f"and `dpop sft` make a folder of it, {folder_name}/ beside it; in Python, models.gguf.folder_of_gguf does."
        )
    folder = expanded(name_or_path)
    if looks_local(name_or_path) and not any((folder / file).exists() for file in MODEL_FILES):
        raise ValueError(
            f"model: expected a folder with {' or '.join(MODEL_FILES)}, found none at {name_or_path!r}. "
            "Check the path (it is relative to the working directory)."
        )


def is_adapter_folder(name_or_path: str) -> bool:
    """Whether the name is that of a local folder with an adapter."""
    return (expanded(name_or_path) / ADAPTER_CONFIG).is_file()


def adapter_on_adapter(name_or_path: str) -> str:
    """The sentence for a new adapter asked for on a model that is one."""
    return (
        f"peft_config: expected None (use_peft: false) with the model {name_or_path!r}, which is an adapter itself, "
        "got one. Leave it out to train that adapter on; for a new adapter, merge that one first with `dpop export` "
        "and train on the merged model."
    )


def check_local_path(name_or_path: str, required_file: str) -> None:
    """
    Raises:
        ValueError: the name is that of a local folder, and there is no such folder with this file.
    """
    if looks_local(name_or_path) and not (expanded(name_or_path) / required_file).exists():
        raise ValueError(
            f"model: expected a folder with {required_file or 'a tokenizer'}, found none at {name_or_path!r}. "
            "Check the path (it is relative to the working directory)."
        )


def check_trained_path(name_or_path: str) -> None:
    """
    Raises:
        ValueError: the name is that of a local folder, and there is none, or one with neither a model nor an adapter.
    """
    path = expanded(name_or_path)
    if path.is_dir():
        if not any((path / file).exists() for file in MODEL_FILES):
            raise ValueError(
                f"model: expected a folder with config.json or adapter_config.json, found neither in "
                f"{name_or_path!r}. Name the output_dir of a finished run, or one of its checkpoints."
            )
    elif path.is_file() or looks_local(name_or_path):
        found = "a file" if path.is_file() else "nothing"
        raise ValueError(
            f"model: expected an existing folder or a hub id, found {found} at {name_or_path!r}. Check the path "
            "(it is relative to the working directory)."
        )
