"""DPOPTrainer: preference fine-tuning with TRL's interface, on this package's kernels."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dpop_kernels import ScoringHead
from dpop_kernels.loss_options import LossOptions
from dpop_kernels.pair_loss import pair_loss_terms
from dpop_trainer.base import HeadTrainer, check_streams, disable_dropout, tokenise_for_training
from dpop_trainer.config import DPOPConfig
from dpop_trainer.data import PairCollator, SkippedRecords
from dpop_trainer.data.stream import first_records, is_stream
from dpop_trainer.layout import ScoredModel, choose_layout, forward_inputs
from dpop_trainer.loading import Policy, prepare_policy
from dpop_trainer.metrics import layout_metrics, loss_metrics, pair_metrics, token_metrics
from dpop_trainer.reference import adapter_off, frozen_copy, precompute_reference, reference_segment_logps

logger = logging.getLogger(__name__)

# nats; what fp32 sums over a long answer may differ by when policy and reference are the same weights
STEP_0_TOLERANCE = 1e-2

# of the data set's first; enough to see a mask or a position that is not heeded, and seconds for any model
NUM_PROBED_PAIRS = 2


class DPOPTrainer(HeadTrainer):
    """Fine-tune a causal LM on (prompt, chosen, rejected) with DPOP, any of its kin, or a weighted sum of them.

    The constructor is TRL's `DPOTrainer`'s.

    Args:
        model: a causal LM, a peft model, or a name or path to load one from (with args.model_init_kwargs).
        ref_model: the frozen reference. By default the base model under the adapter where there is one (peft_config
            given, or a peft model passed), else a frozen copy of the model.
        args: `DPOPConfig`.
        data_collator: defaults to `PairCollator` with the layout of `args`; must return the same keys.
        train_dataset: columns prompt, chosen, rejected, as text or as messages; or token ids in prompt_ids, chosen_ids,
            rejected_ids; or another form of docs/data.md. With columns ref_chosen_logps and ref_rejected_logps no
            reference model is run. An IterableDataset is read, tokenised and counted as training goes on, again and
            again until args.max_steps.
        eval_dataset: the same, or a dict of such data sets by name: metrics are then eval_<name>_...
        processing_class: the tokenizer. By default loaded from the model's name or path.
        compute_metrics: refused: no logits exist that it could be given.
        callbacks: transformers callbacks.
        optimizers: (optimizer, scheduler), as in transformers.
        quantization_config: used when `model` is a name: QLoRA together with peft_config.
        peft_config: wraps the model, for LoRA.
        run_config: what the run's config.yaml is to hold; the training arguments by default.

    Raises:
        ValueError: arguments that disagree, or data that cannot be used: what, where, and the remedy.
    """

    args: DPOPConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOPConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | DatasetDict | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        run_config: dict[str, Any] | None = None,
    ) -> None:
        args = args if args is not None else DPOPConfig(default_output_dir(model))
        _check_arguments(model, args, train_dataset, eval_dataset, processing_class)
        if compute_metrics is not None:
            raise ValueError(
                "compute_metrics: expected None, got a function. It would be given logits, which this trainer never "
                "computes; read the logged metrics instead, or use a callback."
            )
        set_seed(args.seed)  # peft draws the adapter's initial weights
        policy = prepare_policy(
            model,
            processing_class,
            init_kwargs=args.model_init_kwargs,  # type: ignore[arg-type]
            trust_remote_code=args.trust_remote_code,
            quantization_config=quantization_config,
            peft_config=peft_config,
            gradient_checkpointing=args.gradient_checkpointing,
            pad_token=args.pad_token,
            chat_template_path=args.chat_template_path,
        )
        warn_of_router_loss(policy.model)
        self._policy = policy
        data_metrics: dict[str, float] = {}
        skipped = SkippedRecords(args.output_dir, clear=train_dataset is not None and args.process_index == 0)
        self._skipped = skipped

        def tokenise(dataset: Any, name: str, *, repeat: bool = False) -> Any:
            return _tokenised(dataset, name, policy, args, data_metrics, skipped, repeat=repeat)

        train_dataset, eval_dataset = tokenise(train_dataset, "train", repeat=True), tokenise(eval_dataset, "eval")
        has_columns = [_has_reference_columns(part) for part in _parts(train_dataset, eval_dataset)]
        self._reference_from_columns = all(has_columns) or args.precompute_ref_log_probs
        ref_is_another_model = ref_model is not None
        self._reference_is_adapter_off = ref_model is None and isinstance(policy.model, PeftModel)
        if ref_model is None and not self._reference_is_adapter_off and not all(has_columns):
            ref_model = frozen_copy(policy.model)
        self.ref_model = ref_model
        if ref_model is not None:
            if ref_model is policy.model:
                raise ValueError(
                    "ref_model: expected a model of its own, got the policy itself, which would train the reference "
                    "too. Pass None for a frozen copy."
                )
            ref_model.eval().requires_grad_(False)
            if args.disable_dropout:
                disable_dropout(ref_model)
            self.ref_head = ScoringHead(ref_model, backend=args.kernel_backend)

        super().__init__(
            policy.model,
            args,
            data_metrics=data_metrics,
            run_config=run_config,
            data_collator=data_collator
            or PairCollator(
                pad_token_id=policy.tokenizer.pad_token_id,  # type: ignore[arg-type]
                prefix_sharing=args.prefix_sharing,
                pad_to_multiple_of=args.pad_to_multiple_of,  # type: ignore[arg-type]
                hidden_size=getattr(policy.model.config.get_text_config(), "hidden_size", None),
                vocab_size=policy.vocab_size,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if data_collator is None:
            probed = _parts(train_dataset, eval_dataset)[0]
            layout = choose_layout(
                args.layout,
                ScoredModel(self.model, self.head),
                ScoredModel(ref_model, self.ref_head) if ref_is_another_model else None,
                self.data_collator,  # type: ignore[arg-type]
                first_records(probed, NUM_PROBED_PAIRS),
                max_length=args.max_length,
            )
            self.data_collator = replace(self.data_collator, layout=layout)  # type: ignore[type-var]
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        if args.precompute_ref_log_probs and not all(has_columns):
            self._precompute_reference()
        self._step_0_logratio: Tensor | None = None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `transformers.Trainer.evaluate`, on pairs in any form that the constructor takes.

        Args:
            eval_dataset: by default the constructor's; else pairs, several sets of them by name, or the name of one
                of the constructor's.
            ignore_keys: unused.
            metric_key_prefix: what the metrics' names begin with.

        Raises:
            ValueError: the data cannot be used, or lacks the reference log-probs that this run takes from the data.
        """
        if isinstance(eval_dataset, Mapping):
            metrics = {}
            for name, part in eval_dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if isinstance(eval_dataset, Dataset):
            _check_form("eval_dataset", eval_dataset)
            eval_dataset = _tokenised(eval_dataset, metric_key_prefix, self._policy, self.args, {}, self._skipped)
            if not (_has_reference_columns(eval_dataset) or self._reference_is_adapter_off or self.ref_model):
                raise ValueError(
                    "eval_dataset: expected the columns ref_chosen_logps and ref_rejected_logps, since this run took "
                    "its reference from such columns and has no reference model, got none. Add them, or pass ref_model."
                )
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]

    def num_items(self, batch: Mapping[str, Any]) -> int:
        return batch["pair_ids"].shape[0]

    def token_counts(self, batch):
        logical, computed = batch["token_counts"]
        return {"num_tokens": logical, "num_computed_tokens": computed}

    def item_losses(self, model, batch, mode):
        model_inputs = forward_inputs(batch, self.accelerator.unwrap_model(self.model))
        logps, stats = self.head.token_logps(
            model, batch["score_positions"], batch["target_ids"], return_stats=True, **model_inputs
        )
        options = self._loss_options(mode)
        pairs, terms = pair_loss_terms(
            logps,
            batch["cu_seqlens"],
            self._reference_logps(batch, model_inputs),
            loss_weights=self.args.weights_by_loss(),
            options=options,
            backend=self.args.kernel_backend,
        )
        if mode == "train" and self.state.global_step == 0 and self._step_0_logratio is None:
            self._step_0_logratio = torch.stack([pairs.chosen_logratios, pairs.rejected_logratios]).abs().max()
        metrics = {
            **pair_metrics(pairs, beta=options.beta, dead_zone=options.dead_zone),
            **loss_metrics(terms, options),
            **token_metrics(stats, batch["cu_seqlens"]),
            **layout_metrics(batch),
        }
        is_bad = ~torch.isfinite(pairs.losses.detach() + pairs.margins + pairs.chosen_logratios)
        return pairs.losses.sum(), is_bad, metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._step_0_logratio is not None and self.state.global_step > 0:
            largest = float(self._step_0_logratio)
            self._step_0_logratio = None
            logs = {**logs, "dpop/step_0_max_logratio": largest}
            if largest > STEP_0_TOLERANCE:
                logger.warning(
                    "Policy and reference differ by up to %.3g nats per answer before the first update. Expected when "
                    "the reference is another model; otherwise look for dropout, another dtype, a trained adapter, "
                    "or stale reference log-probs.",
                    largest,
                )
        super().log(logs, start_time)

    def _loss_options(self, mode: str) -> LossOptions:
        """Evaluation takes the full λ from the first step on: one objective, by which checkpoints compare."""
        if mode == "eval":
            return self.args.loss_options()
        return self.args.loss_options(self.args.lambda_at(self.state.global_step, self.state.max_steps))

    def _reference_logps(self, batch: dict[str, Any], model_inputs: dict[str, Any]) -> Tensor:
        if self._reference_from_columns and "ref_segment_logps" in batch:
            return batch["ref_segment_logps"]
        backend = self.args.kernel_backend
        if self._reference_is_adapter_off:
            with adapter_off(self.accelerator.unwrap_model(self.model)):
                wrapped: Any = self.model_wrapped
                return reference_segment_logps(self.head, wrapped, batch, model_inputs, backend)
        return reference_segment_logps(self.ref_head, self.ref_model, batch, model_inputs, backend)  # type: ignore[arg-type]

    def _precompute_reference(self) -> None:
        def with_reference(dataset: Dataset, batch_size: int) -> Dataset:
            batch_size = self.args.precompute_ref_batch_size or batch_size
            return precompute_reference(self, dataset, batch_size)

        args = self.args
        if self.train_dataset is not None:
            self.train_dataset = with_reference(self.train_dataset, args.per_device_train_batch_size)  # type: ignore[arg-type]
        if isinstance(self.eval_dataset, dict):
            for name, part in self.eval_dataset.items():
                self.eval_dataset[name] = with_reference(part, args.per_device_eval_batch_size)
        elif self.eval_dataset is not None:
            self.eval_dataset = with_reference(self.eval_dataset, args.per_device_eval_batch_size)  # type: ignore[arg-type]


def default_output_dir(model: Any) -> str:
    """Where a run goes that has no configuration: "<the model's name>-DPOP"."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{Path(name).name or type(model).__name__}-DPOP"


def warn_of_router_loss(model: Any) -> None:
    """TRL adds a mixture of experts' load-balancing loss where the model's config gives it a weight; here it is not."""
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if hasattr(config, "output_router_logits") else 0.0
    router_is_trained = any("router" in name or ".gate." in name for name in _trained_names(model))
    if coefficient and router_is_trained:
        logger.warning(
            "%s: its load-balancing loss (router_aux_loss_coef %g) is not added, and its router is trained. Leave the "
            "router out of the training, as LoRA on the attention's projections does.",
            config.model_type,
            coefficient,
        )


def _trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tokenised(
    dataset: Any,
    name: str,
    policy: Policy,
    args: DPOPConfig,
    data_metrics: dict[str, float],
    skipped: SkippedRecords,
    *,
    repeat: bool = False,
) -> Any:
    if isinstance(dataset, Mapping):
        return {key: _tokenised(part, key, policy, args, data_metrics, skipped) for key, part in dataset.items()}
    return tokenise_for_training(
        dataset,
        name,
        policy,
        args,
        data_metrics,
        keep_identical=args.keep_identical,
        skipped=skipped,
        repeat=repeat,
    )


def _check_arguments(model: Any, args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any) -> None:
    if not isinstance(model, str | nn.Module):
        raise ValueError(f"model: expected a causal LM, or a name or path to load one, got {type(model).__name__}.")
    if not isinstance(args, DPOPConfig):
        raise ValueError(f"args: expected a DPOPConfig, got {type(args).__name__}. Its fields have TRL's names.")
    if train_dataset is None and eval_dataset is None:
        raise ValueError("train_dataset: expected a data set (or at least an eval_dataset), got None.")
    eval_parts = list(eval_dataset.values()) if isinstance(eval_dataset, Mapping) else [eval_dataset]
    check_streams(args, train_dataset, *eval_parts)
    if args.precompute_ref_log_probs and any(map(is_stream, (train_dataset, *eval_parts))):
        raise ValueError(
            "precompute_ref_log_probs: expected False with a streamed data set, got True. Load the data set whole, or "
            "let the reference run beside the policy."
        )
    if isinstance(train_dataset, Mapping):
        raise ValueError(
            f"train_dataset: expected one data set, got several: {sorted(map(str, train_dataset))}. Pass one split."
        )
    if hasattr(processing_class, "tokenizer"):
        raise ValueError(
            f"processing_class: expected a tokenizer, got {type(processing_class).__name__}. Pass its .tokenizer; "
            "images are not trained on."
        )
    _check_form("train_dataset", train_dataset)
    _check_form("eval_dataset", eval_dataset)


def _check_form(name: str, dataset: Any) -> None:
    parts = dataset.values() if isinstance(dataset, Mapping) else [dataset]
    for part in parts:
        images = {"image", "images"} & set(getattr(part, "column_names", None) or ())
        if images:
            raise ValueError(
                f"{name}: expected pairs of text, got the column {images.pop()!r}. Vision-language data is not trained "
                "on here; remove the column, or use TRL's trainer with dpop_kernels.integrations.trl."
            )


def _parts(train_dataset, eval_dataset) -> list[Dataset]:
    parts = list(eval_dataset.values()) if isinstance(eval_dataset, Mapping) else [eval_dataset]
    return [part for part in [train_dataset, *parts] if part is not None]


def _has_reference_columns(dataset: Dataset) -> bool:
    return {"ref_chosen_logps", "ref_rejected_logps"} <= set(dataset.column_names)
