"""Checkpoints that are whole or not there, and what is checked before a run goes on from one.

transformers writes a checkpoint file by file into its final folder, and picks the highest number on resuming. Here the
files are written to `.incomplete/checkpoint-N`, and the folder is renamed into place once it is whole; whoever reads
`checkpoint-N`, this package or another, never sees a part of it. `checkpoint.json` in it lists the files with their
sizes and hashes, which are looked at before a run goes on from them or a tool loads them, and what the run was.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpop_trainer.data.digests import problem_with
from dpop_trainer.run_folder.files import flush_folder, write_json
from dpop_trainer.run_folder.identity import changed_fields, describe_changes
from dpop_trainer.run_folder.sealing import Sealing

logger = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"
RECORD_FILE = "checkpoint.json"
STATE_FILE = "trainer_state.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or continued with this configuration."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The run's checkpoints, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _step(path) is not None]
    return sorted(found, key=lambda path: _step(path) or 0)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint, None where there is none."""
    return next(reversed(checkpoints(output_dir)), None)


def remove_incomplete(output_dir: str | Path) -> None:
    """Remove what a run left that was stopped while it wrote a checkpoint, and say so."""
    folder = Path(output_dir) / INCOMPLETE
    if not folder.exists():
        return
    parts = sorted(path.name for path in folder.iterdir())
    shutil.rmtree(folder, ignore_errors=True)
    if parts:
        logger.warning("Removed what a stopped run left of %s: it was not whole.", ", ".join(parts))


def remove_old(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` checkpoints, and `best` whatever its age. None or 0: keep all."""
    if not limit or limit < 0:
        return
    kept = checkpoints(output_dir)
    protected = {kept[-1]} | ({Path(best)} if best else set()) if kept else set()
    surplus = len(kept) - max(limit, len(protected))
    trash = Path(output_dir) / INCOMPLETE
    for path in [path for path in kept if path not in protected][: max(surplus, 0)]:
        trash.mkdir(exist_ok=True)
        path.rename(trash / path.name)  # so that a run killed while it deletes leaves no part of a checkpoint
    shutil.rmtree(trash, ignore_errors=True)


def files_of(checkpoint: Path) -> list[Path]:
    """All of its files but the record."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RECORD_FILE)


def write_record(checkpoint: Path, identity: Mapping[str, Any], sealing: Sealing) -> None:
    """The last file of a checkpoint: which files belong to it, with sizes and hashes, and what the run was. All is on
    the disk when this returns."""
    files = sealing.digests(checkpoint, files_of(checkpoint))
    write_json(checkpoint / RECORD_FILE, {"files": files, **identity})
    flush_folder(checkpoint)


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, seen before anything is computed: it is not there, or a file of it is
    missing, cut short, unreadable or not what was written. Names the file, and the checkpoint before it where there is
    one; None where nothing is wrong."""
    if not checkpoint.is_dir():
        return (
            f"resume_from_checkpoint: expected a checkpoint's folder, found none at {str(checkpoint)!r}."
            f"{_offer(checkpoint)}"
        )
    problem = _problem(checkpoint)
    if problem is None:
        return None
    return f"{checkpoint}: expected a whole checkpoint, {problem}.{_offer(checkpoint)} Nothing was changed."


def check_same_run(checkpoint: Path, identity: Mapping[str, Any], *, strict: bool) -> None:
    """Hold the configuration that a checkpoint was written with against the present one.

    Args:
        checkpoint: one that `check_checkpoint` found whole. One without a record, from another trainer, is taken as is.
        identity: of the present run, see `run_identity.identity_of`.
        strict: refuse a difference instead of warning.

    Raises:
        CheckpointError: strict, and something that decides the numbers differs; names each field and both values.
    """
    path = checkpoint / RECORD_FILE
    if not path.is_file():
        return
    changes = changed_fields(json.loads(path.read_text()), identity)
    if not changes:
        return
    told = describe_changes(changes)
    if strict:
        raise CheckpointError(
            f"{checkpoint}: expected the configuration that the run began with, got another {told}. Set it back; or "
            "start anew with another output_dir; or go on with the change all the same: --resume_from_checkpoint "
            f"{checkpoint}"
        )
    logger.warning("Going on from %s with another %s. The rest is not the run that began there.", checkpoint, told)


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as the object of "expected a whole checkpoint"; None if nothing is."""
    record = checkpoint / RECORD_FILE
    try:
        listed = json.loads(record.read_text())["files"] if record.is_file() else {}
        json.loads((checkpoint / STATE_FILE).read_text())
        problem = problem_with(checkpoint, listed)
    except FileNotFoundError:
        return f"found no {STATE_FILE} in it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"got an unreadable {STATE_FILE} or {RECORD_FILE} ({error})"
    return problem or _problem_of_weights(checkpoint) or _problem_of_optimizer(checkpoint)


def _problem_of_weights(checkpoint: Path) -> str | None:
    names = [str(path.relative_to(checkpoint)) for path in files_of(checkpoint)]
    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(checkpoint / name, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                return f"got an unreadable {name} ({error})"
    sharded = ("pytorch_model_fsdp", "global_step")  # FSDP's and DeepSpeed's own forms
    if not any(name.endswith(("model.safetensors", ".safetensors.index.json")) for name in names) and not any(
        name.startswith(sharded) for name in names
    ):
        return "found no weights in it (model.safetensors or adapter_model.safetensors)"
    return None


def _problem_of_optimizer(checkpoint: Path) -> str | None:
    if any((checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")):
        return None
    return (
        "found no state of the optimizer in it (optimizer.pt), without which a run does not go on but begins "
        "again from other weights; save_only_model leaves such checkpoints"
    )


def _offer(checkpoint: Path) -> str:
    """The newest other checkpoint of the run that is whole, as advice."""
    others: Iterable[Path] = reversed(checkpoints(checkpoint.parent)) if checkpoint.parent.is_dir() else ()
    for other in others:
        if other.name != checkpoint.name and _problem(other) is None:
            return f" {other.name} is whole: go on from it with --resume_from_checkpoint {other}"
    return " No other checkpoint of this run is whole: start anew with another output_dir, or delete this folder."


def _step(path: Path) -> int | None:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None
