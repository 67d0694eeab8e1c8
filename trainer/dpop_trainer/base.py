"""HeadTrainer: transformers.Trainer whose loss is made of token log-probs and never of logits.

Everything about optimisation, checkpoints, logging back ends and distribution is transformers' and accelerate's. Added
here, for any loss: the scoring head, the mean over all items of the global batch, metrics that stay on the device, and
a stop before a non-finite value is trained on.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from dpop_kernels import ScoringHead
from dpop_trainer.config import HeadConfig
from dpop_trainer.data import SkippedRecords, TokenisedStream, tokenise_pairs
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.stream import as_stream, is_stream
from dpop_trainer.loading import Policy
from dpop_trainer.metrics import MeanMetrics
from dpop_trainer.progress import RunProgress
from dpop_trainer.run_files import RunFiles

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


class NonFiniteError(ValueError):
    """A loss, log-prob or gradient was NaN or infinite; training stopped before the optimizer step."""


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
        super().__init__(model=model, args=args, **trainer_kwargs)
        # compute_loss divides by the items of the whole global batch; transformers must not divide again
        self.model_accepts_loss_kwargs = True
        self._mean_metrics = {"train": MeanMetrics(), "eval": MeanMetrics()}
        self._non_finite: list[tuple[Tensor, Tensor]] = []  # per micro-batch: pair ids [B], is bad [B]
        self._logged_token_counts: dict[str, float] = {}
        self._token_counts: dict[str, Tensor] = {}  # since the last log line, on this process
        self.add_callback(RunFiles(run_config if run_config is not None else args.to_dict(), dict(data_metrics or {})))
        self.add_callback(_StopOnNonFinite(self))
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[override]
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        loss_sum, is_bad, metrics = self.item_losses(model, inputs, mode)
        self._mean_metrics[mode].add(metrics)
        if mode == "train":
            self._non_finite.append((inputs["pair_ids"], is_bad))
            self._count_tokens(inputs)
        if num_items_in_batch is None:
            loss = loss_sum / self.num_items(inputs)
        else:
            # data parallelism averages gradients over processes, and the divisor already counts all of them
            loss = loss_sum * (self.accelerator.num_processes / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        metrics = self._mean_metrics[mode].pop(self.accelerator)
        if metrics:
            metrics.update(self._total_token_counts(start_anew=mode == "train"))
        if mode == "train" and isinstance(self.train_dataset, TokenisedStream):
            counts = self.train_dataset.counts.as_metrics()
            metrics.update({f"train_{key}": float(count) for key, count in counts.items()})
        # an evaluation set by name has its name in transformers' own keys: eval_<name>_loss
        prefix = next((key.removesuffix("loss") for key in logs if key.endswith("_loss")), "eval_")
        prefix = prefix if mode == "eval" else ""
        # in place: what evaluate() returns, and the best checkpoint is chosen by, holds these as well
        logs.update({prefix + key: value for key, value in metrics.items()})
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples, device):
        if not batch_samples:
            return None
        count = sum(self.num_items(batch) for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._last_grad_norm = grad_norm
        return grad_norm

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        return dataset  # the collator reads the columns that it needs; none of them is an argument of the model

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator  # the same for a stream

    def _count_tokens(self, batch: Mapping[str, Any]) -> None:
        for key, count in self.token_counts(batch).items():
            self._token_counts[key] = self._token_counts.get(key, 0) + count.double()

    def _total_token_counts(self, *, start_anew: bool) -> dict[str, float]:
        """Tokens trained on, all processes, resumed runs included; `start_anew` makes them the ones last logged."""
        totals = dict(self._logged_token_counts)
        for key, count in self._token_counts.items():
            logged = (line[key] for line in reversed(self.state.log_history) if key in line)
            totals[key] = next(logged, 0.0) + float(self.accelerator.reduce(count, reduction="sum"))  # type: ignore[arg-type]
        if start_anew:
            self._logged_token_counts, self._token_counts = dict(totals), {}
        return totals

    def stop_if_not_finite(self) -> None:
        """
        Raises:
            NonFiniteError: a loss, a log-prob or the gradient of this step is NaN or infinite; names step and pairs.
        """
        batches, self._non_finite = self._non_finite, []
        if not batches:
            return
        bad_pairs = torch.cat([is_bad for _, is_bad in batches])
        gradient_is_bad = self._gradient_is_bad(bad_pairs.device)
        if not bool(bad_pairs.any() | gradient_is_bad):  # the step's one sync
            return
        pair_ids = torch.cat([ids for ids, _ in batches])
        named = pair_ids[bad_pairs].tolist() or pair_ids.tolist()
        what = "a log-prob or loss" if bool(bad_pairs.any()) else "the gradient norm"
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: expected finite values, got a NaN or infinity in {what}, "
            f"pair ids {named[:16]}{' ...' if len(named) > 16 else ''}. Nothing of this step was applied. Look at "
            "these pairs and their reference log-probs; if they are sound, lower learning_rate or dpop_lambda, or "
            "train in bf16, not fp16."
        )

    def _gradient_is_bad(self, device: torch.device) -> Tensor:
        grad_norm = self._last_grad_norm
        # fp16's loss scaler meets infinite gradients as a matter of course, and skips the step by itself
        if grad_norm is None or self.accelerator.scaler is not None:
            return torch.zeros((), dtype=torch.bool, device=device)
        return ~torch.isfinite(torch.as_tensor(grad_norm, device=device))

    _last_grad_norm: Tensor | float | None = None


class _StopOnNonFinite(TrainerCallback):
    def __init__(self, trainer: HeadTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.stop_if_not_finite()


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
