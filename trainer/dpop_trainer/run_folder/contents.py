"""What a run saved to be loaded, held against the hashes that were written with it, whichever tool loads it."""

import json
import os
from pathlib import Path
from typing import Any

from dpop_trainer.data.digests import problem_with
from dpop_trainer.data.source_path import expanded
from dpop_trainer.run_folder.checkpoints import RECORD_FILE
from dpop_trainer.run_folder.run_files import FINISHED_FILE

# what from_pretrained reads of a folder, and a reference's weights
_LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def check_contents(folder: str | os.PathLike) -> None:
    """Before something is loaded from a folder that a run or a checkpoint of one was saved in: it is what was written.

    Any other folder, and a hub id, are let pass.

    Raises:
        ValueError: a file is missing or has other bytes: names it.
    """
    path = expanded(folder)
    for record in (RECORD_FILE, FINISHED_FILE):
        found = read_record(path / record)
        if found is None:
            continue
        loaded = {file.relative_to(path).as_posix() for file in loaded_files(path)}
        # of a checkpoint the optimizer's state is not loaded; what is gone from it is
        listed = {
            name: entry
            for name, entry in found.get("files", {}).items()
            if name in loaded or not (path / name).exists()
        }
        problem = problem_with(path, listed)
        if problem is not None:
            raise ValueError(
                f"{path}: expected the files that the run wrote, {problem}. Take another checkpoint, or train anew; if "
                f"you changed it yourself, delete {record} there."
            )


def loaded_files(folder: Path) -> list[Path]:
    """The files of a folder that loading a model, its tokenizer or a run's reference reads."""
    return sorted({path for pattern in _LOADED for path in folder.glob(pattern) if path.is_file()})


def read_record(path: Path) -> dict[str, Any] | None:
    """What `checkpoint.json`, `finished.json` or their like says; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None
