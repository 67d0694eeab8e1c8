"""DPOPTrainer: preference fine-tuning with TRL's interface, on this package's kernels."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpop_kernels import ScoringHead, TokenStats
from dpop_kernels.losses.options import LossOptions
from dpop_kernels.losses.pair_loss import pair_loss_terms, segment_sums
from dpop_kernels.losses.weighing import wpo_weights
from dpop_trainer.batches import Batch, PairCollator
from dpop_trainer.batches.batch import as_batch
from dpop_trainer.batches.choose_layout import choose_layout, laid_out
from dpop_trainer.batches.flat_attention import use_flat_attention
from dpop_trainer.batches.own_collator import OwnCollator
from dpop_trainer.batches.routers import RouterLoss, router_coefficient
from dpop_trainer.batches.scoring import ScoredModel, forward_inputs
from dpop_trainer.data import SkippedRecords
from dpop_trainer.data.stream import first_records
from dpop_trainer.models.loading import Policy
from dpop_trainer.reference import PairReference, has_reference_columns
from dpop_trainer.reference.choose import (
    Kind,
    ReferencePlan,
    check_columns,
    data_parts,
    plan_reference,
    reference_model,
)
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.settings.row_options import rows_needed
from dpop_trainer.settings.unknown_keywords import answers_unknown_keywords
from dpop_trainer.training.best_metric import check_best_metric
from dpop_trainer.training.budget_batches import BudgetTrainer
from dpop_trainer.training.metrics import evaluation_names, metrics_of
from dpop_trainer.training.policy import policy_to_train
from dpop_trainer.training.predictions import PairPredictions
from dpop_trainer.training.split_preparation import Preparation
from dpop_trainer.training.trainer_checks import check_arguments, check_weights
from dpop_trainer.training.trl_names import TRLNames
from dpop_trainer.training.watch import ChosenWatch

logger = logging.getLogger(__name__)

# of the data set's first; enough to see a mask or a position that is not heeded, and seconds for any model
NUM_PROBED_PAIRS = 2


@answers_unknown_keywords(DPOPConfig)
class DPOPTrainer(TRLNames, BudgetTrainer):
    """Fine-tune a causal LM on (prompt, chosen, rejected) with DPOP, any of its kin, or a weighted sum of them.

    The constructor is TRL's `DPOTrainer`'s.

    Args:
        model: a causal LM, a peft model, or a name or path to load one from (with args.model_init_kwargs).
        ref_model: the frozen reference, or a name or path to load it from (with args.ref_model_init_kwargs). By default
            the model as it is when the trainer is built: the base under an adapter that is new, else an adapter as it
            was at the start, else a frozen copy of the model.
        args: `DPOPConfig`.
        data_collator: defaults to `PairCollator` with the layout of `args`; returns a `Batch`, a mapping with its keys,
            or the rows of TRL's `DataCollatorForPreference`.
        train_dataset: columns prompt, chosen, rejected, as text or as messages; or token ids in prompt_ids, chosen_ids,
            rejected_ids; or another form of docs/data.md. With columns ref_chosen_logps and ref_rejected_logps no
            reference model is run. An IterableDataset is read, tokenised and counted as training goes on, again and
            again until args.max_steps.
        eval_dataset: the same, or a dict of such data sets by name: metrics are then eval_<name>_...
        processing_class: the tokenizer. By default loaded from the model's name or path.
        compute_metrics: is given the pairs' log-probs, as there are no logits: see `predictions.PREDICTIONS`.
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
        ref_model: str | PreTrainedModel | None = None,
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
        # The order is one of needs: what is wrong is told before anything is loaded; the seed comes before peft draws;
        # the reference is chosen by the data and copied before transformers moves the policy; a layout is tried on both
        # models; batches are planned in that layout; and the pass over the data, which runs the models, is last.
        args = args if args is not None else DPOPConfig(default_output_dir(model))
        check_arguments(
            model, args, train_dataset, eval_dataset, processing_class, data_collator, compute_metrics, ref_model
        )
        may_have_more = bool(callbacks) or compute_metrics is not None or type(self) is not DPOPTrainer
        check_best_metric(args, eval_dataset, evaluation_names(args), may_have_more=may_have_more)
        policy = policy_to_train(
            model,
            processing_class,
            args,
            ref_model=ref_model,
            quantization_config=quantization_config,
            peft_config=peft_config,
            optimizers=optimizers,
            trains=train_dataset is not None,
        )
        self.router_aux_loss_coef = router_coefficient(policy.model, args.router_aux_loss_coef)
        self.preparation = Preparation(
            policy=policy,
            args=args,
            keep_identical=args.keep_identical,
            skipped=SkippedRecords(args.output_dir, clear=train_dataset is not None and args.process_index == 0),
        )
        train_dataset = self.preparation.split(train_dataset, "train", repeat=True)
        eval_dataset = self.preparation.split(eval_dataset, "eval")
        parts = data_parts(train_dataset, eval_dataset)
        check_weights(args, parts)
        plan = plan_reference(
            policy.model,
            ref_model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            is_new_adapter=peft_config is not None,
        )
        self.ref_model = reference_model(plan, policy, ref_model, args, parts)
        super().__init__(
            policy.model,
            args,
            data_metrics=self.preparation.counts,
            run_config=run_config,
            losses=args.loss_type,
            data_collator=_collator(policy, args) if data_collator is None else _understood(data_collator),
            compute_metrics=compute_metrics,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        reference = self._scored_reference()
        if data_collator is None:
            self._lay_out(first_records(parts[0], NUM_PROBED_PAIRS), plan, reference)
        if args.max_tokens_per_batch is not None and train_dataset is not None:
            self.plan_batches(args.max_tokens_per_batch)
        self.reference = PairReference(self, plan, reference)
        if plan.is_precomputed:
            self._precompute_reference()
        self._router_loss = RouterLoss(policy.model) if self.router_aux_loss_coef else None
        self._pair_values: dict[str, Tensor] = {}
        self._predictions = PairPredictions()
        self.add_callback(
            ChosenWatch(
                args.chosen_logratio_warning,
                loss_types=args.loss_type,
                dpop_lambda=args.dpop_lambda,
                reference_moves=plan.moves,
            )
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.compute_metrics is not None and self.counts_batches:
            self._predictions.add(as_batch(inputs), self.pair_values())
        return result

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):  # type: ignore[override]
        self._predictions = PairPredictions()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_metrics is not None and output.metrics is not None:
            own = self._predictions.metrics(self.compute_metrics, self.args)
            prefix = f"{metric_key_prefix}_"
            output.metrics.update({prefix + key.removeprefix(prefix): value for key, value in own.items()})
        return output

    def evaluated_on(self, dataset):
        check_columns(self.args, [dataset])
        return nullcontext() if has_reference_columns(dataset) else self.reference.at_hand()

    def num_items(self, batch: Batch) -> float:
        return batch.pair_ids.shape[0] if batch.weight_sum is None else batch.weight_sum

    def token_counts(self, batch):
        logical, computed = batch.token_counts
        return {"num_tokens": logical, "num_computed_tokens": computed}

    def item_losses(self, model, batch, mode):
        model_inputs = forward_inputs(batch, self.accelerator.unwrap_model(self.model))
        # the reference first: nothing of its forward stays, and so none of the policy's activations lie beside it
        options, ref_logps = self._loss_options(mode), self._reference_logps(batch, model_inputs)
        with self._router_loss.recording() if self._router_loss is not None else nullcontext():
            logps, stats = ScoredModel(model, self.head).token_logps(batch, model_inputs, return_stats=True)
        wpo = self._wpo_weights(logps, stats, batch) if self.args.use_weighting else None
        cached = ref_logps
        if mode == "train" and (own := self.reference.as_policy(logps, batch)) is not None:
            ref_logps = own
        pairs, terms = pair_loss_terms(
            logps,
            batch.cu_seqlens,
            ref_logps,
            loss_weights=self.args.weights_by_loss(),
            options=options,
            ld_alpha=self.args.ld_alpha,
            pair_weights=_product(batch.pair_weights, wpo),
            backend=self.args.kernel_backend,
        )
        if mode == "train" and self.state.global_step == 0 and self.reference.plan.is_needed:
            shared, chosen, rejected = (ref_logps - cached).unbind(-1)  # 0, or what rounding makes of other batches
            self.reference.step_zero.add(
                pairs.chosen_logratios + shared + chosen,
                pairs.rejected_logratios + shared + rejected,
                is_filler=batch.is_filler,
            )
        self._pair_values = {
            "loss": pairs.losses.detach(),
            "chosen_logps": pairs.chosen_logps,
            "rejected_logps": pairs.rejected_logps,
            "ref_chosen_logps": ref_logps[:, 0] + ref_logps[:, 1],
            "ref_rejected_logps": ref_logps[:, 0] + ref_logps[:, 2],
        }
        metrics = metrics_of(
            pairs,
            terms,
            stats,
            batch,
            options=options,
            has_reference=self.reference.plan.is_needed,
            wpo=wpo,
            max_positions=self.args.max_tokens_per_batch if mode == "train" else None,
        )
        is_bad = ~torch.isfinite(pairs.losses.detach() + pairs.margins + pairs.chosen_logratios)
        loss_sum = pairs.losses.sum()
        if self._router_loss is not None:
            # of the micro-batch as a whole, as in TRL: in the step's mean it weighs as much as its pairs
            aux_loss, num_pairs = self._router_loss.take(batch), self.num_items(batch)
            loss_sum = loss_sum + self.router_aux_loss_coef * aux_loss * num_pairs
            metrics["aux_loss"] = (aux_loss.detach() * num_pairs, num_pairs)
        return loss_sum, is_bad, metrics

    def pair_values(self):
        return self._pair_values

    def write_progress(self, folder):
        super().write_progress(folder)
        if self.args.should_save:
            self.reference.save_place(folder)

    def carried_state(self):
        tie = self.reference.tie
        return {**self.reference.step_zero.state(), **(tie.state() if tie is not None else {})}

    def restore_carried_state(self, state):
        tie = self.reference.tie
        self.reference.step_zero.restore(tie.restore(state) if tie is not None else state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:  # type: ignore[union-attr]
            logs.update(self.reference.step_zero.pop_metrics())
        super().log(logs, start_time)

    def tokens_seen(self, batch):
        return batch.token_counts[:1] * (self.counts_batches and not batch.is_filler)

    def _scored_reference(self) -> ScoredModel | None:
        if self.ref_model is None:
            return None
        return ScoredModel(self.ref_model, ScoringHead(self.ref_model, backend=self.args.kernel_backend))

    def _lay_out(self, probed: list[dict[str, Any]], plan: ReferencePlan, reference: ScoredModel | None) -> None:
        """Have the collator make batches in the layout that policy and reference can run."""
        is_copy = plan.kind is Kind.COPY
        needed = rows_needed(self.args) if self.args.layout == "auto" else None
        if needed is not None:
            logger.warning("Layout: two rows per pair, not a tree: %s.", needed)
        layout = choose_layout(
            "rows" if needed is not None else self.args.layout,
            ScoredModel(self.model, self.head),
            None if is_copy else reference,
            self.data_collator,
            probed,
            max_length=self.args.max_length,
        )
        layout = broadcast_object_list([layout])[0]  # rounding may decide otherwise on another rank's device
        self.data_collator = laid_out(self.data_collator, layout, self.model)  # type: ignore[arg-type]
        if layout == "flat" and is_copy:  # which was not probed
            use_flat_attention(self.ref_model)  # type: ignore[arg-type]
        if self.sequence_group is not None:
            self.share_model(self.model)  # whose attention may be another one now
            multiple = math.lcm(self.data_collator.pad_to_multiple_of or 1, self.sequence_group.size)
            self.data_collator = replace(self.data_collator, pad_to_multiple_of=multiple)

    def _loss_options(self, mode: str) -> LossOptions:
        """Evaluation takes the full λ from the first step on: one objective, by which checkpoints compare."""
        if mode == "eval":
            return self.args.loss_options()
        return self.args.loss_options(self.args.lambda_at(self.state.global_step, self.state.max_steps))

    def _reference_logps(self, batch: Batch, model_inputs: dict[str, Any]) -> Tensor:
        return self.reference.segment_logps(batch, model_inputs)

    def _wpo_weights(self, logps: Tensor, stats: TokenStats, batch: Batch) -> Tensor:
        aligned = logps.detach() - stats.log_sum_sq_probs
        sums = segment_sums(aligned, batch.cu_seqlens, backend=self.args.kernel_backend)
        return wpo_weights(sums.view(-1, 3), batch.cu_seqlens)

    def _precompute_reference(self) -> None:
        args = self.args
        self.check_shared_forward()
        precompute = self.reference.precompute
        if self.train_dataset is not None:
            self.train_dataset = precompute(self.train_dataset, "train", args.per_device_train_batch_size)
        if isinstance(self.eval_dataset, dict):
            for name, part in self.eval_dataset.items():
                self.eval_dataset[name] = precompute(part, name, args.per_device_eval_batch_size)
        elif self.eval_dataset is not None:
            self.eval_dataset = precompute(self.eval_dataset, "eval", args.per_device_eval_batch_size)
        self.reference.release()
        self.ref_model = None


def default_output_dir(model: Any) -> str:
    """Where a run goes that has no configuration: "<the model's name>-DPOP"."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{Path(name).name or type(model).__name__}-DPOP"


def _understood(collator: Callable[[list[dict[str, Any]]], Any]) -> Any:
    return collator if isinstance(collator, PairCollator) else OwnCollator(collator)


def _product(*weights: Tensor | None) -> Tensor | None:
    """The product of the weights that there are; None where there are none."""
    given = [weight for weight in weights if weight is not None]
    return math.prod(given[1:], start=given[0]) if given else None


def _collator(policy: Policy, args: DPOPConfig) -> PairCollator:
    return PairCollator(
        pad_token_id=policy.tokenizer.pad_token_id,  # type: ignore[arg-type]
        prefix_sharing=args.prefix_sharing,
        pad_to_multiple_of=args.pad_to_multiple_of,  # type: ignore[arg-type]
        hidden_size=getattr(policy.model.config.get_text_config(), "hidden_size", None),
        vocab_size=policy.vocab_size,
    )
