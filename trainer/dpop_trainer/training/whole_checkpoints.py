"""A Trainer whose checkpoints are whole or not there, and from which a run resumes exactly.

transformers writes a checkpoint file by file into its final place. Here it is written aside, forced to disk and
renamed, with a record of what it holds (`checkpoints`) and of what makes the run what it is (`run_identity`).
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dpop_trainer.run_folder.checkpoints import (
    INCOMPLETE,
    STATE_FILE,
    CheckpointError,
    check_checkpoint,
    check_same_run,
    last_checkpoint,
    remove_incomplete,
    remove_old,
    write_record,
)
from dpop_trainer.run_folder.files import flush_folder, move_folder
from dpop_trainer.run_folder.identity import identity_of
from dpop_trainer.training.given_weights import GivenWeights, use_given_weights
from dpop_trainer.training.hf_hooks import HfHooks
from dpop_trainer.training.speed import TrainingClock


class WholeCheckpoints(HfHooks):
    """transformers.Trainer with these checkpoints. `run_config` is what tells a run from another."""

    run_config: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.resumed_from: Path | None = None
        self._clock = TrainingClock()  # writing does not count as training
        super().__init__(*args, **kwargs)
        self.add_callback(GivenWeights())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`, from a checkpoint that is looked at before anything is computed.

        Args:
            resume_from_checkpoint: a checkpoint's folder; or True for the newest of args.output_dir.
            args, kwargs: as in transformers.

        Raises:
            CheckpointError: the checkpoint is not whole; or, with True, it belongs to a run with another
                configuration, data or number of processes. With a folder such a difference is a warning.
            NonFiniteError: a value was NaN or infinite.
        """
        assert self.args.output_dir is not None
        if self.is_world_process_zero():
            remove_incomplete(self.args.output_dir)
        checkpoint: Path | None = None
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            checkpoint = Path(resume_from_checkpoint)
        elif resume_from_checkpoint:
            checkpoint = last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise CheckpointError(
                    f"resume_from_checkpoint: expected a checkpoint in {str(self.args.output_dir)!r}, found none. "
                    "Train without it to begin."
                )
        if checkpoint is not None:
            check_checkpoint(checkpoint)
            check_same_run(checkpoint, self._identity(), strict=resume_from_checkpoint is True)
        self.resumed_from = checkpoint
        return super().train(str(checkpoint) if checkpoint is not None else None, *args, **kwargs)

    def _identity(self) -> dict[str, Any]:
        return identity_of(self.run_config, num_processes=self.accelerator.num_processes, dataset=self.train_dataset)

    def save_checkpoint(self, output_dir: Path, write: Callable[[str], None]) -> None:
        """transformers' checkpoint, written aside and renamed into place once it is whole.

        Raises:
            CheckpointError: it cannot be written, as on a full disk. The checkpoints that there are stay as they are.
        """
        name = f"checkpoint-{self.state.global_step}"
        part, final = output_dir / INCOMPLETE / name, output_dir / name
        with self._clock.paused():
            if self.is_world_process_zero():
                shutil.rmtree(part, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            use_given_weights(self.optimizer)
            try:
                write(INCOMPLETE)
                self._finish_checkpoint(part, final)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(part, ignore_errors=True)
                raise CheckpointError(_unwritten(final, error)) from error
            self._publish_checkpoint(part, final)
            if self.args.should_save:
                remove_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.args.push_to_hub:
                self.push_checkpoint(final)

    def _finish_checkpoint(self, part: Path, final: Path) -> None:
        """Add what transformers leaves out: the paths as they will be, and what a subclass has summed up."""
        if self.state.best_model_checkpoint == str(part):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(part / STATE_FILE))
        if not self.args.save_only_model:
            self.write_progress(part)

    def write_progress(self, folder: Path) -> None:
        """Add to a checkpoint what a subclass has summed up so far and takes up again when the run is resumed."""

    def _publish_checkpoint(self, part: Path, final: Path) -> None:
        identity = self._identity() if self.is_local_process_zero() else {}
        self.accelerator.wait_for_everyone()
        # nodes that do not share a disk each have a part of their own
        for is_mine in (self.is_world_process_zero(), self.is_local_process_zero()):
            if is_mine and part.is_dir():
                try:
                    write_record(part, identity)
                    flush_folder(part)
                    move_folder(part, final, part.with_name(f"replaced-{final.name}"))
                except OSError as error:
                    shutil.rmtree(part, ignore_errors=True)
                    raise CheckpointError(_unwritten(final, error)) from error
                shutil.rmtree(part.parent, ignore_errors=True)
            self.accelerator.wait_for_everyone()


def _unwritten(final: Path, error: Exception) -> str:
    free = shutil.disk_usage(final.parent).free / 2**30
    kept = last_checkpoint(final.parent)
    rest = (
        f"{kept.name} is untouched: make room, or point output_dir's folder at a larger disk, and start the same "
        "command again to go on from it."
        if kept is not None
        else "There is no earlier checkpoint: make room, or choose an output_dir on a larger disk, and start again."
    )
    return f"{final}: expected to write a checkpoint, got {error} ({free:.2f} GiB are free there). {rest}"
