"""A Trainer whose checkpoints are whole or not there, and from which a run resumes exactly.

transformers writes a checkpoint file by file into its final place. Here it is written aside, forced to disk and
renamed, with a record of what it holds (`checkpoints`) and of what makes the run what it is (`run_identity`).
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError

from dpop_trainer.models.adapters import base_model
from dpop_trainer.reference.keys import plain_config
from dpop_trainer.reference.recall import fingerprint
from dpop_trainer.run_folder.checkpoints import (
    INCOMPLETE,
    STATE_FILE,
    CheckpointError,
    check_same_run,
    checkpoint_problem,
    files_of,
    last_checkpoint,
    remove_incomplete,
    remove_old,
    write_record,
)
from dpop_trainer.run_folder.files import move_folder
from dpop_trainer.run_folder.identity import differences_of_ranks, identity_of
from dpop_trainer.run_folder.lock import held
from dpop_trainer.run_folder.sealing import Sealing
from dpop_trainer.settings.told import is_of_another_process
from dpop_trainer.settings.under_way import under_way
from dpop_trainer.training.given_weights import GivenWeights, use_given_weights
from dpop_trainer.training.hf_hooks import HfHooks
from dpop_trainer.training.non_finite import NonFiniteError, weight_not_finite
from dpop_trainer.training.speed import TrainingClock


class WholeCheckpoints(HfHooks):
    """transformers.Trainer with these checkpoints. `run_config` is what tells a run from another."""

    run_config: dict[str, Any]
    _identity: dict[str, Any]
    """Of the training under way."""
    _sealing: Sealing
    """Of the checkpoint that is being written."""

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
            CheckpointError: another run is going on in the output folder; the checkpoint is not whole; or, with True,
                it belongs to a run with another configuration, data or number of processes. With a folder such a
                difference is a warning.
            NonFiniteError: a value was NaN or infinite.
        """
        with self.folder_held():
            return self._train_there(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def folder_held(self) -> Iterator[None]:
        """The output folder, with no other run in it; `train` holds it too.

        Raises:
            CheckpointError: on all processes together: another run is going on there.
        """
        assert self.args.output_dir is not None
        with ExitStack() as stack:
            problem = None
            if self.is_world_process_zero():
                try:
                    stack.enter_context(held(self.args.output_dir))
                except CheckpointError as error:
                    problem = str(error)
            self._raise_together(problem)
            yield

    def _train_there(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
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
        self._identity = identity_of(
            self.run_config,
            num_processes=self.accelerator.num_processes,
            dataset=self.train_dataset,
            model={"config": plain_config(base_model(self.model)), "base": self.base_fingerprint},
        )
        self._raise_together(self._other_on_this_rank())
        if checkpoint is not None:
            problem = None
            if self.is_local_process_zero():  # one process of each node reads the files
                with under_way(f"Reading {checkpoint}"):
                    problem = checkpoint_problem(checkpoint)
            self._raise_together(problem)
            check_same_run(checkpoint, self._identity, strict=resume_from_checkpoint is True)
        self.resumed_from = checkpoint
        return super().train(str(checkpoint) if checkpoint is not None else None, *args, **kwargs)

    def _raise_together(self, problem: str | None) -> None:
        """
        Raises:
            CheckpointError: on all processes, where one of them has a problem, so that none waits for it.
        """
        found = next(filter(None, gather_object([problem])), None)
        if found is not None:
            raise CheckpointError(found)

    def _other_on_this_rank(self) -> str | None:
        """What this process would train on or with, other than the first one; None where they agree."""
        first = gather_object([self._identity])[0]
        changes = differences_of_ranks(first, self._identity)
        if not changes:
            return None
        told = ", ".join(f"{name}: {old!r} there, {new!r} here" for name, (old, new) in changes.items())
        return (
            f"process {self.args.process_index}: expected the configuration, data and model of process 0, got another "
            f"{told}. Start all processes with the same command, files and versions."
        )

    @functools.cached_property
    def base_fingerprint(self) -> str | None:
        """Of what stays as it is under an adapter, before anything is sharded; None without one, or where it cannot be
        read."""
        return fingerprint(self.model, False) if isinstance(self.model, PeftModel) else None

    def save_checkpoint(self, output_dir: Path, write: Callable[[str], None]) -> None:
        """transformers' checkpoint, written aside and renamed into place once it is whole.

        Raises:
            CheckpointError: it cannot be written, as on a full disk. The checkpoints that there are stay as they are.
            NonFiniteError: there are weights that are no numbers.
        """
        name = f"checkpoint-{self.state.global_step}"
        part, final = output_dir / INCOMPLETE / name, output_dir / name
        with self._clock.paused(), Sealing() as self._sealing:
            if self.is_world_process_zero():
                shutil.rmtree(part, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            use_given_weights(self.optimizer)
            self.check_weights()
            try:
                write(INCOMPLETE)
                self._finish_checkpoint(part, final)
            except (OSError, RuntimeError, SafetensorError) as error:
                if is_of_another_process(error):
                    raise
                if self.is_local_process_zero():  # others may still write there
                    shutil.rmtree(part, ignore_errors=True)
                raise CheckpointError(_unwritten(final, error)) from error
            self._publish_checkpoint(part, final)
            if self.args.should_save:
                remove_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.args.push_to_hub:
                self.push_checkpoint(final)

    def model_written(self, checkpoint: Path) -> None:
        if self.args.should_save:
            self._sealing.take(files_of(checkpoint))

    def check_weights(self) -> None:
        """Before they are saved.

        Raises:
            NonFiniteError: on all processes together: a trained weight is NaN or infinite; names it.
        """
        found = next(filter(None, gather_object([weight_not_finite(self.model)])), None)  # type: ignore[arg-type]
        if found is not None:
            kept = last_checkpoint(str(self.args.output_dir))
            rest = "There is no earlier checkpoint" if kept is None else f"{kept} is from before"
            raise NonFiniteError(
                f"step {self.state.global_step}: expected finite weights to save, got a NaN or infinity in {found}. "
                f"Nothing was saved. {rest}. Lower learning_rate, or train in bf16, not fp16."
            )

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
        self.accelerator.wait_for_everyone()
        # nodes that do not share a disk each have a part of their own
        for is_mine in (self.is_world_process_zero(), self.is_local_process_zero()):
            if is_mine and part.is_dir():
                try:
                    write_record(part, self._identity, self._sealing)
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
