"""HeadTrainer: transformers.Trainer whose loss is made of token log-probs and never of logits.

Everything about optimisation, logging back ends and distribution is transformers' and accelerate's. Added here, for any
loss: the scoring head, the mean over all items of the global batch on any number of ranks, metrics that stay on the
device, checkpoints that are whole and resume exactly, and a stop before a non-finite value is trained on.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainerCallback

from dpop_kernels import ScoringHead
from dpop_trainer.checkpoints import (
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
from dpop_trainer.config import HeadConfig
from dpop_trainer.data import SkippedRecords, TokenisedStream, tokenise_pairs
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.shares import FILLER_KEY, FillerCollator, RankShares, WithFillers
from dpop_trainer.data.stream import as_stream, is_stream
from dpop_trainer.files import flush_folder, move_folder
from dpop_trainer.loading import Policy
from dpop_trainer.metrics import MeanMetrics
from dpop_trainer.non_finite import MicroBatch, NonFiniteError, non_finite_message, not_finite, save_non_finite
from dpop_trainer.progress import RunProgress
from dpop_trainer.run_files import RunFiles
from dpop_trainer.run_identity import identity_of
from dpop_trainer.run_progress import load_progress, save_progress
from dpop_trainer.speed import TrainingClock, peak_memory_gib

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class HeadTrainer(Trainer):
    """Base of the trainers here. A subclass says what one item (a pair, a token) is and what its loss is.

    Args:
        model: a causal LM, loaded.
        args: the configuration.
        data_metrics: counts of what happened to the data; the first line of metrics.jsonl.
        run_config: what config.yaml is to hold; the training arguments if not given.
        trainer_kwargs: passed on to transformers.Trainer.
    """

    args: HeadConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        args: HeadConfig,
        *,
        data_metrics: Mapping[str, float] | None = None,
        run_config: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if args.disable_dropout:
            disable_dropout(model)
        self.head = ScoringHead(model, backend=args.kernel_backend)
        if not any(parameter.is_meta for parameter in model.parameters()):
            self.head.check(model)
        # for a stream, accelerate would read on one process and cut its batches by rows, which packed tensors are not
        args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        self._writes_incomplete = False
        super().__init__(model=model, args=args, **trainer_kwargs)
        # compute_loss divides by the items of the whole global batch; transformers must not divide again
        self.model_accepts_loss_kwargs = True
        self._mean_metrics = {"train": MeanMetrics(), "eval": MeanMetrics()}
        self._micro_batches: list[MicroBatch] = []  # since the last optimizer step
        self._logged_token_counts: dict[str, float] = {}
        self._token_counts: dict[str, Tensor] = {}  # since the last log line, on this process
        self._clock = TrainingClock()
        self._resumed_from: Path | None = None
        self.run_config = run_config if run_config is not None else args.to_dict()
        self.add_callback(RunFiles(self.run_config, dict(data_metrics or {})))
        self.add_callback(_AroundTraining(self))
        if self.pop_callback(ProgressCallback) is not None:  # which prints every log line in full
            self.add_callback(RunProgress(type(self).__name__))

    def num_items(self, batch: Mapping[str, Any]) -> int:
        """How many items a batch holds, read without touching the device."""
        raise NotImplementedError

    def item_losses(
        self, model: nn.Module, batch: dict[str, Any], mode: str
    ) -> tuple[Tensor, Tensor, Mapping[str, tuple[Tensor, Tensor | int]]]:
        """-> sum of the items' losses (with gradient), is-bad flag per pair [B], metrics as sums and weights."""
        raise NotImplementedError

    def token_counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tokens of a batch, without padding, by the name of the running total that is logged."""
        return {"num_tokens": batch["attention_mask"].sum()}

    def pair_values(self) -> Mapping[str, Tensor]:
        """[B] each: what `item_losses` last computed for its pairs, for the report on a value that is not finite."""
        return {}

    def carried_state(self) -> dict[str, Tensor]:
        """What a subclass has to find again when a run is resumed: tensors by name, for `restore_carried_state`."""
        return {}

    def restore_carried_state(self, state: Mapping[str, Tensor]) -> None:
        """The counterpart of `carried_state`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        is_filler = FILLER_KEY in inputs
        loss_sum, is_bad, metrics = self.item_losses(model, inputs, mode)
        if is_filler:  # keeps this rank in step with the others; the pair counts elsewhere
            loss_sum = loss_sum * 0.0
            is_bad = torch.zeros_like(is_bad)
            metrics = {key: (torch.zeros_like(value), 0) for key, (value, _) in metrics.items()}
        self._mean_metrics[mode].add(metrics)
        num_items = 0 if is_filler else self.num_items(inputs)
        if mode == "train":
            self._micro_batches.append(MicroBatch(inputs, is_bad, self.pair_values()))
            self._count_tokens(inputs, weight=0.0 if is_filler else 1.0)
        else:
            self._mean_metrics["eval_loss"].add({"loss": (loss_sum, num_items)})
        if num_items_in_batch is None:
            loss = loss_sum / max(num_items, 1)
        else:
            # data parallelism averages gradients over processes, and the divisor already counts all of them
            loss = loss_sum * (self.accelerator.num_processes / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, inputs)
        return None, None, None  # evaluation_loop makes the means; transformers' are over batches, the last one padded

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):  # type: ignore[override]
        self._mean_metrics |= {"eval": MeanMetrics(), "eval_loss": MeanMetrics()}
        with self._clock.paused():
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            means = {
                **self._mean_metrics["eval_loss"].pop(self.accelerator),
                **self._mean_metrics["eval"].pop(self.accelerator),
                **self._total_token_counts(start_anew=False),
            }
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # evaluation brings its own metrics along, and leaves the model in eval mode
        metrics = self._mean_metrics["train"].pop(self.accelerator) if self.model.training else {}  # type: ignore[union-attr]
        if metrics:
            before = dict(self._logged_token_counts)
            totals = self._total_token_counts(start_anew=True)
            metrics.update(totals)
            seconds = self._clock.lap()
            if "num_tokens" in totals and seconds > 0:
                metrics["tokens/per_second"] = (totals["num_tokens"] - before.get("num_tokens", 0.0)) / seconds
            peak = torch.tensor([peak_memory_gib(self.args.device)], dtype=torch.float64, device="cpu")
            peaks: Any = self.accelerator.gather(peak.to(self.args.device, torch.float32))
            metrics["memory/peak_gib"] = float(peaks.max())
        if self.model.training and isinstance(self.train_dataset, TokenisedStream):  # type: ignore[union-attr]
            counts = self.train_dataset.counts.as_metrics()
            metrics.update({f"train_{key}": float(count) for key, count in counts.items()})
        super().log({**logs, **metrics}, start_time)

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
        self._resumed_from = checkpoint
        return super().train(str(checkpoint) if checkpoint is not None else None, *args, **kwargs)

    def _identity(self) -> dict[str, Any]:
        return identity_of(self.run_config, num_processes=self.accelerator.num_processes, dataset=self.train_dataset)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its last step: transformers would add one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        shard = getattr(loader, "batch_sampler", None)
        if not isinstance(shard, BatchSamplerShard) or shard.split_batches or isinstance(loader.dataset, WithFillers):
            return loader
        # the loader around it goes on placing batches, seeding epochs and telling where they end
        loader.base_dataloader = DataLoader(
            WithFillers(loader.dataset),  # type: ignore[arg-type]
            batch_sampler=RankShares(shard.batch_sampler, num_ranks=shard.num_processes, rank=shard.process_index),
            collate_fn=FillerCollator(loader.collate_fn),
            **{name: getattr(loader, name) for name in _LOADER_OPTIONS},
        )
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if sampler is None and hasattr(eval_dataset, "__len__") else sampler

    def _get_num_items_in_batch(self, batch_samples, device):
        if not batch_samples:
            return None
        count = sum(0 if FILLER_KEY in batch else self.num_items(batch) for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(grad_norm, DTensor):  # FSDP2's, a part on each rank
            grad_norm = grad_norm.full_tensor()
        self._last_grad_norm = grad_norm
        return grad_norm

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        return dataset  # the collator reads the columns that it needs; none of them is an argument of the model

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator  # the same for a stream

    def _count_tokens(self, batch: Mapping[str, Any], *, weight: float) -> None:
        for key, count in self.token_counts(batch).items():
            self._token_counts[key] = self._token_counts.get(key, 0) + weight * count.double()

    def _total_token_counts(self, *, start_anew: bool) -> dict[str, float]:
        """Tokens trained on, all processes, resumed runs included; `start_anew` makes them the ones last logged."""
        totals = dict(self._logged_token_counts)
        for key, count in self._token_counts.items():
            logged = (line[key] for line in reversed(self.state.log_history) if key in line)
            totals[key] = next(logged, 0.0) + float(self.accelerator.reduce(count, reduction="sum"))  # type: ignore[arg-type]
        if start_anew:
            self._logged_token_counts, self._token_counts = dict(totals), {}
        return totals

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE) if self._writes_incomplete else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' checkpoint, written aside and renamed into place once it is whole.

        Raises:
            CheckpointError: it cannot be written, as on a full disk. The checkpoints that there are stay as they are.
        """
        output_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        part, final = output_dir / INCOMPLETE / name, output_dir / name
        with self._clock.paused():
            if self.is_world_process_zero():
                shutil.rmtree(part, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            try:
                self._writes_incomplete = True
                super()._save_checkpoint(model, trial)
                self._finish_checkpoint(part, final)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(part, ignore_errors=True)
                raise CheckpointError(_unwritten(final, error)) from error
            finally:
                self._writes_incomplete = False
            self._publish_checkpoint(part, final)
            if self.args.should_save:
                remove_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.args.push_to_hub:
                super()._push_from_checkpoint(str(final))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":  # torch.load knows a place "cpu", and none "cpu:0", which ranks are given
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        path = Path(output_dir) / "scheduler.pt"
        if self.args.should_save and path.is_file():
            # FSDP2 makes learning rates tensors of rank 0's device, which another rank may not have
            torch.save(_as_numbers(self.lr_scheduler.state_dict()), path)  # type: ignore[union-attr]

    def _finish_checkpoint(self, part: Path, final: Path) -> None:
        """Add what transformers leaves out: the sums towards the next log line, and the paths as they will be."""
        if self.state.best_model_checkpoint == str(part):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(part / STATE_FILE))
        if not self.args.save_only_model:
            save_progress(self, part)

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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writes_incomplete:  # else it follows when the folder is in place
            super()._push_from_checkpoint(checkpoint_folder)

    def begin_training(self) -> None:
        """Called when the loop is about to begin, the model wrapped and a checkpoint loaded."""
        self._micro_batches = []
        self._mean_metrics["train"] = MeanMetrics()
        self._token_counts, self._logged_token_counts = {}, {}
        if self._resumed_from is not None:
            load_progress(self, self._resumed_from)
            for key in {key for line in self.state.log_history for key in line if key.startswith("num_")}:
                logged = (line[key] for line in reversed(self.state.log_history) if key in line)
                self._logged_token_counts[key] = next(logged, 0.0)
        self._clock.restart()

    def stop_if_not_finite(self) -> None:
        """
        Raises:
            NonFiniteError: a loss, a log-prob or the gradient of this step is NaN or infinite; names step and pairs,
                and where the batch has been saved. All ranks raise it together.
        """
        batches, self._micro_batches = self._micro_batches, []
        if not batches:
            return
        pairs_are_bad = torch.cat([batch.is_bad for batch in batches]).any()
        # fp16's loss scaler meets infinite gradients as a matter of course, and skips the step by itself
        heeds_gradient = self._last_grad_norm is not None and self.accelerator.scaler is None
        gradient_is_bad = not_finite(self._last_grad_norm if heeds_gradient else 0.0, pairs_are_bad.device)
        flags: Any = torch.stack([pairs_are_bad, gradient_is_bad]).float()
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, reduction="sum")
        if not bool(flags.any()):  # the step's one sync
            return
        step, rank = self.state.global_step + 1, self.args.process_index
        what = "a log-prob or loss" if bool(flags[0] > 0) else "the gradient norm"
        folder = Path(str(self.args.output_dir)) / f"nonfinite_step_{step}"
        pair_ids = []
        if bool(pairs_are_bad) or not bool(flags[0] > 0):
            pair_ids = save_non_finite(
                folder,
                batches,
                step=step,
                rank=rank,
                what=what,
                dataset=self.train_dataset,
                tokenizer=self.processing_class,
            )
            pair_ids = pair_ids or torch.cat([batch.inputs["pair_ids"] for batch in batches]).tolist()
        self.accelerator.wait_for_everyone()  # a rank that ends takes the others along; let all of them write first
        raise NonFiniteError(non_finite_message(step, what, pair_ids, folder))

    _last_grad_norm: Tensor | float | None = None


# of a DataLoader, beside what it loads from
_LOADER_OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class _AroundTraining(TrainerCallback):
    def __init__(self, trainer: HeadTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.begin_training()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.stop_if_not_finite()


def _as_numbers(value: Any) -> Any:
    """Nested lists and dicts with their scalar tensors as numbers."""
    if isinstance(value, dict):
        return {key: _as_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_as_numbers(item) for item in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


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


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout to zero: modules, and numbers that a module hands to its attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_streams(args: HeadConfig, train_dataset: Any, *eval_datasets: Any) -> None:
    """
    Raises:
        ValueError: data sets are streamed, and the configuration asks for what only whole ones allow.
    """
    if is_stream(train_dataset) and getattr(args, "max_tokens_per_batch", None) is not None:
        raise ValueError(
            "max_tokens_per_batch: expected None with a streamed train_dataset, whose lengths are not known, got "
            f"{args.max_tokens_per_batch}. Set per_device_train_batch_size, or load it whole."  # type: ignore[attr-defined]
        )
    if is_stream(train_dataset) and args.max_steps <= 0:
        raise ValueError(
            f"max_steps: expected the number of optimizer steps, since train_dataset is streamed and has no length, "
            f"got {args.max_steps}. Set max_steps, or load the data set whole."
        )
    if not any(map(is_stream, (train_dataset, *eval_datasets))):
        return
    if args.accelerator_config.dispatch_batches:  # type: ignore[union-attr]
        raise ValueError(
            "accelerator_config.dispatch_batches: expected None or False, got True. Batches are packed and cannot be "
            "split by rows; every process reads the stream and takes its share."
        )
    if args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers: expected 0 with a streamed data set, whose records are tokenised and counted by "
            f"the training process, got {args.dataloader_num_workers}."
        )


def tokenise_for_training(
    dataset: Any,
    name: str,
    policy: Policy,
    args: HeadConfig,
    data_metrics: dict[str, float],
    *,
    keep_identical: bool,
    skipped: SkippedRecords | None = None,
    completions: bool = False,
    repeat: bool = False,
) -> Any:
    """Tokenise a split as the configuration says, tell what became of its pairs, and add the counts to data_metrics.

    Args:
        dataset: pairs in any form, rows of `read_pairs`, or a stream of either, which is tokenised as it is read.
        name: of the split, in messages and counts: "train", "eval", or an evaluation set's name.
        policy: whose tokenizer and vocabulary are used.
        args: the configuration.
        data_metrics: is given the counts; those of a stream are logged as it runs.
        keep_identical: keep pairs whose two answers have the same tokens.
        skipped: is given the records that are left out.
        completions: take prompt and completion too.
        repeat: a stream begins anew when it ends.

    Returns:
        A tokenised Dataset or `TokenisedStream`; None for None.

    Raises:
        ValueError: the data cannot be used: what, where, and the remedy.
    """
    if dataset is None:
        return None
    if is_stream(dataset):
        return TokenisedStream(
            as_stream(dataset, completions=completions),
            policy.tokenizer,
            name=name,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,  # type: ignore[arg-type]
            keep_identical=keep_identical,
            vocab_size=policy.vocab_size,
            on_bad_record=args.on_bad_record,  # type: ignore[arg-type]
            skipped=skipped,
            repeat=repeat,
        )

    def on_skipped(bad_records: list[BadRecord]) -> None:
        if skipped is not None and args.process_index == 0:
            skipped.add(name, bad_records)

    with args.main_process_first(desc="tokenising"):  # the others find its work in the cache
        dataset, counts = tokenise_pairs(
            dataset,
            policy.tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,  # type: ignore[arg-type]
            num_proc=args.dataset_num_proc,
            keep_identical=keep_identical,
            vocab_size=policy.vocab_size,
            on_bad_record=args.on_bad_record,  # type: ignore[arg-type]
            on_skipped=on_skipped,
            completions=completions,
        )
    logger.warning("%s data: %s", name, counts.summary())
    data_metrics.update({f"{name}_{key}": value for key, value in counts.as_metrics().items()})
    return dataset
