"""DPOPTrainer: preference fine-tuning with TRL's interface, on this package's kernels."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dpop_kernels import ScoringHead, pair_loss
from dpop_trainer.base import HeadTrainer, disable_dropout, tokenise_for_training
from dpop_trainer.config import DPOPConfig
from dpop_trainer.data import PairCollator
from dpop_trainer.layout import ScoredModel, choose_layout, forward_inputs
from dpop_trainer.loading import prepare_policy
from dpop_trainer.metrics import layout_metrics, pair_metrics, token_metrics
from dpop_trainer.reference import adapter_off, frozen_copy, precompute_reference, reference_segment_logps
from dpop_trainer.watch import ChosenWatch

logger = logging.getLogger(__name__)

# nats; what fp32 sums over a long answer may differ by when policy and reference are the same weights
STEP_0_TOLERANCE = 1e-2

# of the data set's first; enough to see a mask or a position that is not heeded, and seconds for any model
NUM_PROBED_PAIRS = 2


class DPOPTrainer(HeadTrainer):
    """Fine-tune a causal LM on (prompt, chosen, rejected) with DPOP, DPO, IPO or SLiC.

    The constructor is TRL's `DPOTrainer`'s.

    Args:
        model: a causal LM, a peft model, or a name or path to load one from (with args.model_init_kwargs).
        ref_model: the frozen reference. By default the base model under the adapter where there is one (peft_config
            given, or a peft model passed), else a frozen copy of the model.
        args: `DPOPConfig`.
        data_collator: defaults to `PairCollator` with the layout of `args`; must return the same keys.
        train_dataset: columns prompt, chosen, rejected, as text or as messages; or token ids in prompt_ids, chosen_ids,
            rejected_ids. With columns ref_chosen_logps and ref_rejected_logps no reference model is run.
        eval_dataset: the same, or a dict of such data sets by name.
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
        args = args if args is not None else DPOPConfig()
        _check_arguments(model, args, train_dataset, eval_dataset)
        if compute_metrics is not None:
            raise ValueError(
                "compute_metrics: expected None, got a function. It would be given logits, which this trainer never "
                "computes; read the logged metrics instead, or use a callback."
            )
        set_seed(args.seed)  # peft draws the adapter's initial weights
        policy = prepare_policy(
            model,
            processing_class,
            init_kwargs=args.model_init_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
            gradient_checkpointing=args.gradient_checkpointing,
        )
        data_metrics: dict[str, float] = {}

        def tokenise(dataset: Any, name: str) -> Any:
            if isinstance(dataset, Mapping):
                return {part_name: tokenise(part, part_name) for part_name, part in dataset.items()}
            return tokenise_for_training(dataset, name, policy, args, data_metrics, keep_identical=args.keep_identical)

        train_dataset, eval_dataset = tokenise(train_dataset, "train"), tokenise(eval_dataset, "eval")
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
                pad_to_multiple_of=args.pad_to_multiple_of,
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
                probed.select(range(min(NUM_PROBED_PAIRS, len(probed)))).to_list(),
                max_length=args.max_length,
            )
            layout = broadcast_object_list([layout])[0]  # rounding may decide otherwise on another rank's device
            self.data_collator = replace(self.data_collator, layout=layout)  # type: ignore[type-var]
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        if args.precompute_ref_log_probs and not all(has_columns):
            self._precompute_reference()
        self._step_0_logratio: Tensor | None = None
        self._pair_values: dict[str, Tensor] = {}
        self.add_callback(
            ChosenWatch(args.chosen_logratio_warning, loss_type=str(args.loss_type), dpop_lambda=args.dpop_lambda)
        )

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
        ref_logps = self._reference_logps(batch, model_inputs)
        pairs = pair_loss(
            logps,
            batch["cu_seqlens"],
            ref_logps,
            loss_type=self.args.loss_type,
            beta=self.args.beta,
            dpop_lambda=self.args.dpop_lambda,
            backend=self.args.kernel_backend,
        )
        if mode == "train" and self.state.global_step == 0 and self._step_0_logratio is None:
            self._step_0_logratio = torch.stack([pairs.chosen_logratios, pairs.rejected_logratios]).abs().max()
        self._pair_values = {
            "loss": pairs.losses.detach(),
            "chosen_logps": pairs.chosen_logps,
            "rejected_logps": pairs.rejected_logps,
            "ref_chosen_logps": ref_logps[:, 0] + ref_logps[:, 1],
            "ref_rejected_logps": ref_logps[:, 0] + ref_logps[:, 2],
        }
        metrics = {
            **pair_metrics(pairs, beta=self.args.beta),
            **token_metrics(stats, batch["cu_seqlens"]),
            **layout_metrics(batch),
        }
        is_bad = ~torch.isfinite(pairs.losses.detach() + pairs.margins + pairs.chosen_logratios)
        return pairs.losses.sum(), is_bad, metrics

    def pair_values(self):
        return self._pair_values

    def carried_state(self):
        return {} if self._step_0_logratio is None else {"step_0_logratio": self._step_0_logratio}

    def restore_carried_state(self, state):
        self._step_0_logratio = state.get("step_0_logratio")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._step_0_logratio is not None and self.state.global_step > 0:
            on_all_ranks: Any = self.accelerator.gather(self._step_0_logratio.reshape(1))
            largest = float(on_all_ranks.max())
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


def _check_arguments(model: Any, args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    if not isinstance(model, str | nn.Module):
        raise ValueError(f"model: expected a causal LM, or a name or path to load one, got {type(model).__name__}.")
    if not isinstance(args, DPOPConfig):
        raise ValueError(f"args: expected a DPOPConfig, got {type(args).__name__}. Its fields have TRL's names.")
    if train_dataset is None and eval_dataset is None:
        raise ValueError("train_dataset: expected a data set (or at least an eval_dataset), got None.")
    if isinstance(train_dataset, Mapping):
        raise ValueError(
            f"train_dataset: expected one data set, got several: {sorted(map(str, train_dataset))}. Pass one split."
        )


def _parts(train_dataset, eval_dataset) -> list[Dataset]:
    parts = list(eval_dataset.values()) if isinstance(eval_dataset, Mapping) else [eval_dataset]
    return [part for part in [train_dataset, *parts] if part is not None]


def _has_reference_columns(dataset: Dataset) -> bool:
    return {"ref_chosen_logps", "ref_rejected_logps"} <= set(dataset.column_names)
