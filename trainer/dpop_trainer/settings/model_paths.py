"""Names of models that can be seen to be wrong without loading anything."""

from pathlib import Path

from dpop_trainer.data.source_path import looks_local


def check_local_path(name_or_path: str, required_file: str) -> None:
    """
    Raises:
        ValueError: the name is that of a local folder, and there is no such folder with this file.
    """
    if looks_local(name_or_path) and not (Path(name_or_path).expanduser() / required_file).exists():
        raise ValueError(
            f"model: expected a folder with {required_file or 'a tokenizer'}, found none at {name_or_path!r}. "
            "Check the path (it is relative to the working directory)."
        )


def check_trained_path(name_or_path: str) -> None:
    """
    Raises:
        ValueError: the name is that of a local folder, and there is none, or one with neither a model nor an adapter.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not any((path / file).exists() for file in ("adapter_config.json", "config.json")):
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
