"""Finished runs: told apart from interrupted ones, so that neither is trained anew or left alone in silence."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpop_trainer.run_folder.checkpoints import CheckpointError, last_checkpoint
from dpop_trainer.run_folder.files import write_json
from dpop_trainer.run_folder.identity import LENGTH_FIELDS, changed_fields, describe_changes
from dpop_trainer.run_folder.private import without_secrets
from dpop_trainer.run_folder.run_files import FINISHED_FILE


def mark_finished(folder: Path, config: Mapping[str, Any], *, step: int) -> None:
    """Written last of all, when the model is saved."""
    write_json(folder / FINISHED_FILE, {"step": step, "config": without_secrets(config)})


def is_finished(output_dir: str | None, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very run, finished; prints that it does, and what can be done.

    A run that is to be longer than it was goes on from its last checkpoint.

    Raises:
        CheckpointError: the folder holds a finished run with another configuration, or one that is to be longer and
            left no checkpoint to go on from.
    """
    path = Path(str(output_dir)) / FINISHED_FILE
    try:
        finished = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    before = finished["config"]
    step, changes = finished["step"], changed_fields(finished, {"config": config})
    if changes:
        raise CheckpointError(
            f"output_dir: expected a folder for this run, got {str(output_dir)!r}, which holds a finished run with "
            f"another {describe_changes(changes)}. Choose another output_dir, or delete that folder."
        )
    length = {key for key in LENGTH_FIELDS if key in before and key in config and before[key] != config[key]}
    if not length:
        if os.environ.get("RANK", "0") != "0":
            return True
        print(
            f"Finished already: {output_dir} holds this run's model after {step} steps; nothing was trained. To train "
            "longer, raise max_steps or num_train_epochs; to train anew, choose another output_dir or delete that one."
        )
        return True
    if last_checkpoint(path.parent) is None:
        raise CheckpointError(
            f"{', '.join(sorted(length))}: expected the finished run in {str(output_dir)!r} to have left a checkpoint "
            f"to go on from, found none: it was trained with save_strategy {before.get('save_strategy')!r}. Choose "
            "another output_dir, and its model as model_name_or_path."
        )
    return False
