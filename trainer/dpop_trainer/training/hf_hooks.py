"""What the trainers here change inside of transformers' Trainer by its private names: in this file and nowhere else.

Each is either mended in place, or hands on to a method with a public name, which the classes that build on this one
override. `tests/training/test_hf_hooks.py` sees to it that each still exists upstream, is called there, and takes what
it is passed here.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from dpop_trainer.batches.batch import Batch, as_batch


class LossSums(NamedTuple):
    """What transformers has summed up towards its next log line and its last one."""

    since_log: Tensor
    """Scalar on the device: of the steps since the last log line."""
    before: float
    """Of all steps up to there."""
    last_logged_step: int


class HfHooks(Trainer):
    """transformers.Trainer with its inner steps made public."""

    last_grad_norm: Tensor | float | None = None
    """Of the step under way, before clipping."""

    reads_on_host: bool = False
    """Read an optimizer's state into the host's memory, not the device's."""

    _aside: str | None = None  # a folder of the output folder, while a checkpoint is written there

    # ---- for subclasses

    def placed(self, collated: Mapping[str, Any]) -> Batch:
        """A collator's result as the batch that it is, on this process's device."""
        return as_batch(collated).to(self.args.device)

    def dealt_out(self, loader: Any) -> Any:
        """A loader as accelerate has prepared it -> the one that is used."""
        return loader

    def num_global_items(self, batches: list[Any], device: torch.device) -> Tensor | float:
        """Items, or the sum of their weights, of the micro-batches of an optimizer step, over all processes: what the
        loss is divided by."""
        raise NotImplementedError

    def tokens_seen(self, batch: Batch) -> Tensor | None:
        """[1] int64, what a batch adds to `num_input_tokens_seen`. None leaves it to transformers, which counts the
        batch's columns."""
        return None

    def save_checkpoint(self, output_dir: Path, write: Callable[[str], None]) -> None:
        """Save the checkpoint of this step.

        Args:
            output_dir: where checkpoints are to be.
            write: has transformers write its checkpoint into a folder of that name in `output_dir`.
        """
        raise NotImplementedError

    def model_written(self, checkpoint: Path) -> None:
        """While a checkpoint is written: the files of the model are complete, the optimizer's state comes next."""

    def state_to_save(self) -> dict[str, Any] | None:
        """What the model's files are made of. None leaves it to the model."""
        return None

    def push_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint as args.hub_strategy says. None is uploaded while it is written."""
        super()._push_from_checkpoint(str(folder))

    @property
    def loss_sums(self) -> LossSums:
        """Of the training under way; to be set when a run is resumed."""
        return LossSums(self._tr_loss, float(self._total_loss_scalar), self._globalstep_last_logged)

    @loss_sums.setter
    def loss_sums(self, sums: LossSums) -> None:
        self._tr_loss, self._total_loss_scalar, self._globalstep_last_logged = sums

    # ---- data

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return self.dealt_out(super()._get_dataloader(*args, **kwargs))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        # without one, accelerate deals out single records and not batches
        return SequentialSampler(eval_dataset) if sampler is None and hasattr(eval_dataset, "__len__") else sampler

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        return dataset  # the collator reads the columns that it needs; none of them is an argument of the model

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        return data_collator  # the same for a stream

    # ---- the step

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> Batch:
        # under DeepSpeed transformers rounds a batch's floats to the weights' dtype: here the reference's log-probs
        return self.placed(inputs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its last step: transformers would add one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | float | None:
        return self.num_global_items(batch_samples, device) if batch_samples else None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(grad_norm, DTensor):  # FSDP2's, a part on each rank
            grad_norm = grad_norm.full_tensor()
        self.last_grad_norm = grad_norm
        return grad_norm

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        counted = self.tokens_seen(as_batch(inputs)) if self.args.include_num_input_tokens_seen != "no" else None
        if counted is None:
            super()._track_num_input_tokens(inputs)
            return
        counts: Any = self.accelerator.gather(counted.to(self.args.device))
        self.state.num_input_tokens_seen += int(counts.sum())

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def write(name: str) -> None:
            self._aside = name
            try:
                super(HfHooks, self)._save_checkpoint(model, trial)
            finally:
                self._aside = None

        self.save_checkpoint(Path(super()._get_output_dir(trial)), write)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._aside is None else os.path.join(folder, self._aside)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, self.state_to_save() if state_dict is None else state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.model_written(Path(output_dir))
        super()._save_optimizer_and_scheduler(output_dir)
        path = Path(output_dir) / "scheduler.pt"
        if self.args.should_save and path.is_file():
            # FSDP2 makes learning rates tensors of rank 0's device, which another rank may not have
            torch.save(_as_numbers(self.lr_scheduler.state_dict()), path)  # type: ignore[union-attr]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        device = self.args.device
        if device.type == "cpu" or self.reads_on_host:
            # torch.load knows a place "cpu", and none "cpu:0", which ranks are given
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            if device.type != "cpu":
                self.args.__dict__["_setup_devices"] = device


def _as_numbers(value: Any) -> Any:
    """Nested lists and dicts with their scalar tensors as numbers."""
    if isinstance(value, dict):
        return {key: _as_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_as_numbers(item) for item in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
