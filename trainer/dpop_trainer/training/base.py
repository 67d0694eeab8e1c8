"""HeadTrainer: transformers.Trainer whose loss is made of token log-probs and never of logits.

Everything about optimisation, logging back ends and distribution is transformers' and accelerate's. Added here, for any
loss: the scoring head, the mean over all items of the global batch on any number of ranks, metrics that stay on the
device, checkpoints that are whole and resume exactly, and a stop before a non-finite value is trained on.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from dpop_kernels import ScoringHead
from dpop_trainer.batches.batch import Batch, as_batch
from dpop_trainer.batches.collate import PairCollator
from dpop_trainer.batches.scoring import ScoredModel
from dpop_trainer.data import TokenisedStream
from dpop_trainer.data.counts import NO_COUNTS
from dpop_trainer.measure.policy_probe import probe_policy
from dpop_trainer.models.layer_kernels import use_layer_kernels
from dpop_trainer.models.loading import disable_dropout
from dpop_trainer.models.quantised import as_arguments, computed_in
from dpop_trainer.models.tiled_mlp import check_tiles, tile_mlps
from dpop_trainer.reference.source import eval_mode
from dpop_trainer.report.run_page import RunPage
from dpop_trainer.run_folder.run_files import RunFiles
from dpop_trainer.settings.config import HeadConfig
from dpop_trainer.training.exact_shares import ExactShares
from dpop_trainer.training.metrics import MeanMetrics
from dpop_trainer.training.model_card import NamedCard, tag_model
from dpop_trainer.training.non_finite import MicroBatch, NonFiniteError, non_finite_message, not_finite, save_non_finite
from dpop_trainer.training.progress import RunProgress
from dpop_trainer.training.run_card import is_kept, write_run_card
from dpop_trainer.training.run_progress import Progress, load_progress, save_progress
from dpop_trainer.training.speed import peak_memory_gib
from dpop_trainer.training.split_preparation import Preparation, check_streams
from dpop_trainer.training.trainer_checks import check_form
from dpop_trainer.training.whole_checkpoints import WholeCheckpoints

_COUNTS = "stream_counts/"


class HeadTrainer(ExactShares, WholeCheckpoints, NamedCard):
    """Base of the trainers here. A subclass says what one item (a pair, a token) is and what its loss is.

    Args:
        model: a causal LM, loaded.
        args: the configuration.
        data_metrics: counts of what happened to the data; the first line of metrics.jsonl.
        run_config: what config.yaml is to hold; the training arguments if not given.
        losses: names of what is trained with, for the model's tags.
        trainer_kwargs: passed on to transformers.Trainer.
    """

    args: HeadConfig  # type: ignore[assignment]
    preparation: Preparation
    """How this run makes data ready; set by a subclass before this class's own constructor."""
    ref_model: Any = None
    """A model beside the policy."""

    def __init__(
        self,
        model: nn.Module,
        args: HeadConfig,
        *,
        data_metrics: Mapping[str, float] | None = None,
        run_config: dict[str, Any] | None = None,
        losses: Iterable[str] = (),
        **trainer_kwargs: Any,
    ) -> None:
        if args.disable_dropout:
            disable_dropout(model)
        if args.tiled_mlp is not None:
            check_tiles(model)
        tile_mlps(model, args.tiled_mlp)  # type: ignore[arg-type]
        self.head = ScoringHead(model, backend=args.kernel_backend)
        if not any(parameter.is_meta for parameter in model.parameters()):
            self.head.check(model)
        # for a stream, accelerate would read on one process and cut its batches by rows, which packed tensors are not
        args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        super().__init__(model=model, args=args, **trainer_kwargs)
        if args.tiled_mlp is not None and is_deepspeed_zero3_enabled():
            raise ValueError(
                "tiled_mlp: expected weights that are whole while a layer runs (DDP, FSDP2, ZeRO-2), got ZeRO-3, which "
                "would gather them for each tile anew. Leave it out, or use FSDP2."
            )
        self.share_model(model)
        tag_model(model, losses)
        # compute_loss divides by the items of the whole global batch; transformers must not divide again
        self.model_accepts_loss_kwargs = True
        self._mean_metrics = {"train": MeanMetrics(), "eval": MeanMetrics()}
        self._micro_batches: list[MicroBatch] = []  # since the last optimizer step
        self._logged_token_counts: dict[str, float] = {}
        self._token_counts: dict[str, Tensor] = {}  # since the last log line, on this process
        self._counts_before: dict[str, float] = {}  # of a stream, by a checkpoint
        self.run_config = run_config if run_config is not None else args.to_dict() | as_arguments(model)
        self.add_callback(RunFiles(self.run_config, dict(data_metrics or {})))
        self.add_callback(RunPage(self.run_config))
        self.add_callback(_AroundTraining(self))
        if self.pop_callback(ProgressCallback) is not None:  # which prints every log line in full
            self.add_callback(RunProgress(type(self).__name__))

    def num_items(self, batch: Batch) -> float:
        """How many items a batch holds, or the sum of their weights, read without touching the device."""
        raise NotImplementedError

    def item_losses(
        self, model: nn.Module, batch: Batch, mode: str
    ) -> tuple[Tensor, Tensor, Mapping[str, tuple[Tensor, Tensor | float]]]:
        """-> sum of the items' weighted losses (with gradient), is-bad flag per pair [B], metrics as sums and
        weights."""
        raise NotImplementedError

    def token_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens of a batch, without padding, by the name of the running total that is logged."""
        return {"num_tokens": batch.attention_mask.sum()}

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
        batch = as_batch(inputs)
        loss_sum, is_bad, metrics = self.item_losses(model, batch, mode)
        if batch.is_filler:  # keeps this rank in step with the others; the pair counts elsewhere
            loss_sum = loss_sum * 0.0
            is_bad = torch.zeros_like(is_bad)
            metrics = {key: (torch.zeros_like(value), 0) for key, (value, _) in metrics.items()}
        self._mean_metrics[mode].add(metrics)
        num_items = 0 if batch.is_filler else self.num_items(batch)
        if mode == "train":
            self._micro_batches.append(MicroBatch(batch, is_bad, self.pair_values()))
            self._count_tokens(batch, weight=float(self.counts_batches and not batch.is_filler))
        else:
            self._mean_metrics["eval_loss"].add({"loss": (loss_sum, num_items)})
        if num_items_in_batch is None:
            loss = loss_sum / (num_items or 1)
        else:
            # data parallelism averages gradients over processes, and the divisor already counts all of them
            factor = self.num_data_ranks / num_items_in_batch
            loss = loss_sum * (factor.to(loss_sum.dtype) if isinstance(factor, Tensor) else factor)
        return (loss, {}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `transformers.Trainer.evaluate`, on data in any form that the constructor takes, streamed or not.

        Args:
            eval_dataset: by default the constructor's; else a data set, several of them by name, or the name of one of
                the constructor's.
            ignore_keys: unused.
            metric_key_prefix: what the metrics' names begin with.

        Raises:
            ValueError: the data cannot be used, or need a reference that cannot be had.
        """
        if isinstance(eval_dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, part in eval_dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]
        if not isinstance(eval_dataset, TokenisedStream):
            check_form("eval_dataset", eval_dataset)
            check_streams(self.args, None, eval_dataset)
            eval_dataset = self.preparation.split(eval_dataset, metric_key_prefix)
        with self.evaluated_on(eval_dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]

    def evaluated_on(self, dataset: Any) -> AbstractContextManager[None]:
        """What an evaluation on a prepared data set of its own needs, for as long as it takes."""
        return nullcontext()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self.placed(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, inputs)
        return None, None, None  # evaluation_loop makes the means; transformers' are over batches, the last one padded

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):  # type: ignore[override]
        self.check_shared_forward()
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`transformers.Trainer.save_model`, with a README of ours, and beside it what the policy gives:
        `policy_probe.json`, by which what is made of the files later can be held against what was trained.

        Raises:
            NonFiniteError: there are weights that are no numbers.
        """
        if not _internal_call:
            self.check_weights()
        folder = Path(str(output_dir or self.args.output_dir))
        keeps_readme = is_kept(folder)
        with nullcontext() if _internal_call or not self.is_fsdp_enabled else _whole_weights(self.accelerator):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and not keeps_readme:
            self._write_card(folder)
        is_sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if is_sharded or self.tensor_parallel_size > 1 or not self.args.should_save or not self.has_own_collator():
            return
        policy: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        is_autocast = self.accelerator.mixed_precision in ("bf16", "fp16")
        dtypes = {policy.dtype, *computed_in(policy)}
        is_rounded = is_autocast or any(dtype.itemsize < 4 for dtype in dtypes)
        collator: Any = self.data_collator
        with eval_mode(policy), self.accelerator.autocast():
            probe = probe_policy(ScoredModel(policy, self.head), collator, self.args.device, is_rounded=is_rounded)
        probe.write(Path(output_dir or str(self.args.output_dir)))

    def _write_card(self, folder: Path) -> None:
        policy: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        write_run_card(
            folder,
            base=str(self.run_config.get("model_name_or_path") or getattr(policy, "name_or_path", "") or ""),
            tags=list(getattr(policy, "model_tags", None) or []),
            run_config=self.run_config,
            step=self.state.global_step,
        )

    def has_own_collator(self) -> bool:
        """Whether batches are made here, and not by a collator that was passed in."""
        return isinstance(self.data_collator, PairCollator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            # the sum goes on in a resumed run; transformers 5.24 divides it by the steps since resuming
            logs["train_loss"] = self.loss_sums.before / max(self.state.global_step, 1)
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
        if self.model.training:  # type: ignore[union-attr]
            metrics.update({f"train_{key}": count for key, count in self._stream_counts().items()})
        logs.update(metrics)  # in place, as transformers does with the epoch: evaluate() returns what is logged
        super().log(logs, start_time)

    def num_global_items(self, batches, device):
        count = sum(0 if batch.is_filler else self.num_items(batch) for batch in map(as_batch, batches))
        if self.accelerator.num_processes == 1:
            return count
        count *= self.counts_batches
        # in fp64, which holds counts and sums of weights alike
        return self.accelerator.reduce(torch.tensor(count, dtype=torch.float64, device=device), reduction="sum")

    def _count_tokens(self, batch: Batch, *, weight: float) -> None:
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

    def _stream_counts(self) -> dict[str, float]:
        """What became of the records that a training stream has read; of a run that was resumed at its end and reads
        none, of those that it had read."""
        if not isinstance(self.train_dataset, TokenisedStream):
            return {}
        counts = self.train_dataset.counts
        if counts == NO_COUNTS and self._counts_before:
            return self._counts_before
        return {key: float(count) for key, count in counts.as_metrics().items()}

    def write_progress(self, folder):
        keys, totals = self._mean_metrics["train"].state()
        counts = {
            f"{_COUNTS}{key}": torch.tensor(count, dtype=torch.float64) for key, count in self._stream_counts().items()
        }
        carried = {**self.carried_state(), **counts}
        progress = Progress(self.loss_sums, keys, totals, self._token_counts, carried)
        save_progress(progress, folder, rank=self.args.process_index)

    def begin_training(self) -> None:
        """Called when the loop is about to begin, the model wrapped and a checkpoint loaded."""
        self._micro_batches = []
        self._mean_metrics["train"] = MeanMetrics()
        self._token_counts, self._logged_token_counts = {}, {}
        self._counts_before = {}
        if self.resumed_from is not None:
            progress = load_progress(self.resumed_from, rank=self.args.process_index, device=self.args.device)
            if progress is not None:
                self._take_up(progress)
            for key in {key for line in self.state.log_history for key in line if key.startswith("num_")}:
                logged = (line[key] for line in reversed(self.state.log_history) if key in line)
                self._logged_token_counts[key] = next(logged, 0.0)
        if self.args.use_liger_kernel:
            if self.ref_model is not None:  # transformers has seen to the policy
                use_layer_kernels(self.ref_model, self.args.liger_kernel_config or {})
            for model in (self.model, self.ref_model):  # the kernels stand where the tiles stood
                if model is not None:
                    tile_mlps(model, self.args.tiled_mlp)  # type: ignore[arg-type]
        self.check_shared_forward()
        self._clock.restart()

    def _take_up(self, progress: Progress) -> None:
        self.loss_sums = progress.losses
        self._mean_metrics["train"].restore(progress.metric_keys, progress.metric_totals)
        self._token_counts = progress.token_counts
        counts = {key for key in progress.carried if key.startswith(_COUNTS)}
        self._counts_before = {key.removeprefix(_COUNTS): float(progress.carried[key]) for key in sorted(counts)}
        self.restore_carried_state({key: value for key, value in progress.carried.items() if key not in counts})

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
        heeds_gradient = self.last_grad_norm is not None and self.accelerator.scaler is None
        gradient_is_bad = not_finite(self.last_grad_norm if heeds_gradient else 0.0, pairs_are_bad.device)
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
            pair_ids = pair_ids or torch.cat([batch.inputs.pair_ids for batch in batches]).tolist()
        self.accelerator.wait_for_everyone()  # a rank that ends takes the others along; let all of them write first
        raise NonFiniteError(non_finite_message(step, what, pair_ids, folder))


class _AroundTraining(TrainerCallback):
    def __init__(self, trainer: HeadTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.begin_training()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.stop_if_not_finite()


@contextmanager
def _whole_weights(accelerator: Accelerator) -> Iterator[None]:
    """What is saved inside is for `from_pretrained`, also where checkpoints are FSDP's shards: transformers alone would
    then save nothing."""
    plugin: Any = accelerator.state.fsdp_plugin
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {name: getattr(plugin, name) for name in names}
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(plugin, name, value)
