"""Finished runs: told apart from interrupted ones, so that neither is trained anew or left alone in silence.

`finished.json` is written last of all, when the model is on the disk. It lists what a run leaves to be loaded, and the
files that it was trained on, with hashes: a run is finished while both are what they were.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpop_trainer.data.digests import digest_of, problem_with
from dpop_trainer.run_folder.checkpoints import CheckpointError, last_checkpoint
from dpop_trainer.run_folder.contents import loaded_files, read_record
from dpop_trainer.run_folder.files import flush, write_json
from dpop_trainer.run_folder.identity import LENGTH_FIELDS, changed_fields, describe_changes
from dpop_trainer.run_folder.private import without_secrets
from dpop_trainer.run_folder.run_files import FINISHED_FILE
from dpop_trainer.run_folder.sealing import Sealing


def mark_finished(folder: Path, config: Mapping[str, Any], *, step: int, sources: Iterable[str] = ()) -> None:
    """Written last of all, when the model is saved.

    Args:
        folder: of the run.
        config: all fields of the run; its secrets are left out.
        step: the last one.
        sources: paths of the run's data; what is no file, such as a hub id, is passed over.
    """
    with Sealing() as sealing:
        files = sealing.digests(folder, loaded_files(folder))
    flush(folder)
    record = {
        "step": step,
        "config": without_secrets(config),
        "files": files,
        "data": {source: digest_of(Path(source)) for source in sources if Path(source).is_file()},
    }
    write_json(folder / FINISHED_FILE, record)
    flush(folder / FINISHED_FILE)
    flush(folder)


def finished_already(output_dir: str | None, config: Mapping[str, Any]) -> str | None:
    """What to say where the folder holds this very run, finished: that it does, and what can be done. None where there
    is something to train.

    A run that is to be longer than it was goes on from its last checkpoint.

    Raises:
        CheckpointError: the folder holds a finished run with another configuration or other data, one whose model is
            not what it saved, or one that is to be longer and left no checkpoint to go on from.
    """
    folder = Path(str(output_dir))
    finished = read_record(folder / FINISHED_FILE)
    if finished is None:
        return None
    before = finished["config"]
    step, changes = finished["step"], changed_fields(finished, {"config": config})
    other_data = _changed_data(finished)
    if changes or other_data:
        told = describe_changes(changes) if changes else f"content of {other_data}"
        raise CheckpointError(
            f"output_dir: expected a folder for this run, got {str(output_dir)!r}, which holds a finished run with "
            f"another {told}. Choose another output_dir, or delete that folder."
        )
    length = {key for key in LENGTH_FIELDS if key in before and key in config and before[key] != config[key]}
    if not length:
        _check_model(folder, finished)
        return (
            f"Finished already: {output_dir} holds this run's model after {step} steps; nothing was trained. To train "
            "longer, raise max_steps or num_train_epochs; to train anew, choose another output_dir or delete that one."
        )
    if last_checkpoint(folder) is None:
        raise CheckpointError(
            f"{', '.join(sorted(length))}: expected the finished run in {str(output_dir)!r} to have left a checkpoint "
            f"to go on from, found none: it was trained with save_strategy {before.get('save_strategy')!r}. Choose "
            "another output_dir, and its model as model_name_or_path."
        )
    return None


def _changed_data(finished: Mapping[str, Any]) -> str | None:
    """The first file of the run's data that has another content now. One that is gone says nothing."""
    for source, digest in finished.get("data", {}).items():
        path = Path(source)
        if path.is_file() and digest_of(path) != digest:
            return source
    return None


def _check_model(folder: Path, finished: Mapping[str, Any]) -> None:
    problem = problem_with(folder, finished.get("files", {}))
    if problem is None:
        return
    kept = last_checkpoint(folder)
    way = (
        f"the same command then goes on from {kept.name} and saves the model again"
        if kept is not None
        else "the same command then trains anew, as there is no checkpoint"
    )
    raise CheckpointError(
        f"{folder}: expected the model that the finished run saved, {problem}. Delete {FINISHED_FILE} there: {way}."
    )
