"""KTOTrainer: fine-tuning on single answers, each desirable or not, through the same head."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpop_kernels import ScoringHead
from dpop_kernels.losses.pair_loss import segment_sums
from dpop_kernels.losses.unpaired import UNPAIRED_LOSSES, kto_loss
from dpop_trainer.batches import Batch
from dpop_trainer.batches.scoring import ScoredModel
from dpop_trainer.data import SkippedRecords
from dpop_trainer.models.positions import usable_positions
from dpop_trainer.reference import PairReference
from dpop_trainer.reference.adapters import adapter_changes_nothing
from dpop_trainer.reference.choose import Kind, ReferencePlan, data_parts, reference_model
from dpop_trainer.settings.config import KTOConfig
from dpop_trainer.settings.unknown_keywords import answers_unknown_keywords
from dpop_trainer.training.base import HeadTrainer
from dpop_trainer.training.best_metric import check_best_metric
from dpop_trainer.training.policy import policy_to_train
from dpop_trainer.training.sft import CompletionCollator
from dpop_trainer.training.split_preparation import Preparation

logger = logging.getLogger(__name__)

_COLUMNS = ("prompt", "completion", "label")
_SIDES = ("chosen", "rejected")  # as TRL's metrics call answers with and without the label
_METRICS = (
    "kl",
    "entropy",
    "rewards/margins",
    *(f"{of}/{side}" for side in _SIDES for of in ("rewards", "logps", "logits")),
)


@answers_unknown_keywords(KTOConfig)
class KTOTrainer(HeadTrainer):
    """Fine-tune a causal LM on (prompt, completion, label): answers that were liked, or not, without pairs of them.

    The constructor is TRL's `KTOTrainer`'s.

    Args:
        model: a causal LM, a peft model, or a name or path to load one from.
        ref_model: the frozen reference. By default the model as it is when the trainer is built: the base under an
            adapter that is new, else an adapter as it was at the start, else a frozen copy of the model.
        args: `KTOConfig`.
        data_collator: refused: the KL term is made of batches as they are made here.
        train_dataset: columns prompt and completion, as text or as messages, and label: True for a desirable answer.
        eval_dataset: the same, or a dict of such data sets by name.
        processing_class: the tokenizer. By default loaded from the model's name or path.
        compute_metrics: refused: no logits exist that it could be given.
        callbacks: transformers callbacks.
        optimizers: (optimizer, scheduler), as in transformers.
        quantization_config: used when `model` is a name: QLoRA together with peft_config.
        peft_config: wraps the model, for LoRA.
        run_config: what the run's config.yaml is to hold; the training arguments by default.

    Raises:
        ValueError: data that cannot be used: what, where, and the remedy.

    Source:
        Ethayarajh et al. 2024, arXiv:2402.01306; see `dpop_kernels.kto_loss`.
    """

    args: KTOConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: KTOConfig | None = None,
        data_collator: None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        run_config: dict[str, Any] | None = None,
    ) -> None:
        args = args if args is not None else KTOConfig()
        _check_arguments(ref_model, data_collator, compute_metrics)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_answers(name, dataset)
        may_have_more = bool(callbacks) or type(self) is not KTOTrainer
        check_best_metric(args, eval_dataset, _METRICS, may_have_more=may_have_more)
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
        self.preparation = LabelledPreparation(
            policy=policy,
            args=args,
            keep_identical=True,
            skipped=SkippedRecords(args.output_dir, clear=train_dataset is not None and args.process_index == 0),
            completions=True,
        )
        train_dataset = self.preparation.split(train_dataset, "train")
        eval_dataset = self.preparation.split(eval_dataset, "eval")
        if train_dataset is not None:
            _tell_of_balance(train_dataset, args)
        plan = ReferencePlan(_kind(policy.model, ref_model, is_new_adapter=peft_config is not None))
        reference = reference_model(plan, policy, ref_model, args, data_parts(train_dataset, eval_dataset))  # type: ignore[arg-type]
        limits = (args.max_length, usable_positions(policy.model, args.row_multiple))
        super().__init__(
            policy.model,
            args,
            data_metrics=self.preparation.counts,
            run_config=run_config,
            losses=[args.loss_type],
            data_collator=UnpairedCollator(
                policy.tokenizer.pad_token_id,  # type: ignore[arg-type]
                args.row_multiple,
                with_mismatched=UNPAIRED_LOSSES[args.loss_type],
                max_length=min((limit for limit in limits if limit is not None), default=None),
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.ref_model = reference
        scored = (
            None if reference is None else ScoredModel(reference, ScoringHead(reference, backend=args.kernel_backend))
        )
        self.reference = PairReference(self, plan, scored)  # type: ignore[arg-type]

    def has_own_collator(self) -> bool:
        return True

    def num_items(self, batch: Batch) -> int:
        return batch.pair_ids.shape[0]

    def item_losses(self, model: nn.Module, batch: Batch, mode: str):
        # what has no gradient first: nothing of it lies beside the policy's activations
        kl = self._kl(model, batch)
        ref_logps = self.reference.segment_logps(batch, batch.model_inputs())[:, 0]
        logps, stats = ScoredModel(model, self.head).token_logps(batch, batch.model_inputs(), return_stats=True)
        answer_logps = segment_sums(logps, batch.cu_seqlens, backend=self.args.kernel_backend)
        losses = kto_loss(
            answer_logps,
            ref_logps,
            batch.labels,
            kl=kl,
            beta=self.args.beta,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
            reduction="none",
        )
        rewards = self.args.beta * (answer_logps.detach() - ref_logps)
        token_labels = batch.labels.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(logps))
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            "kl": (kl, 1),
            "entropy": (stats.entropy.sum(), len(logps)),
        }
        for side, is_on_side, tokens in zip(
            _SIDES, (batch.labels, ~batch.labels), (token_labels, ~token_labels), strict=True
        ):
            for name, values in (("rewards", rewards), ("logps", answer_logps.detach())):
                metrics[f"{name}/{side}"] = (torch.where(is_on_side, values, 0).sum(), is_on_side.sum())
            metrics[f"logits/{side}"] = (torch.where(tokens, stats.mean_logit, 0).sum(), tokens.sum())
        (liked, num_liked), (disliked, num_disliked) = (metrics[f"rewards/{side}"] for side in _SIDES)
        has_both = torch.logical_and(num_liked > 0, num_disliked > 0)  # type: ignore[operator, arg-type]
        margin = liked / num_liked.clamp(min=1) - disliked / num_disliked.clamp(min=1)  # type: ignore[union-attr]
        metrics["rewards/margins"] = (torch.where(has_both, margin, 0), has_both)
        return losses.sum(), ~torch.isfinite(losses.detach()), metrics

    @torch.no_grad()
    def _kl(self, model: nn.Module, batch: Batch) -> Tensor:
        """z0 of `kto_loss`, over all processes; 0 for a loss without it."""
        if "mismatched" not in batch:
            return torch.zeros((), device=batch.cu_seqlens.device)
        mismatched = batch.mismatched
        logps = ScoredModel(model, self.head).token_logps(mismatched, mismatched.model_inputs())
        logps = segment_sums(logps, mismatched.cu_seqlens, backend=self.args.kernel_backend)
        differences = logps - self.reference.segment_logps(mismatched, mismatched.model_inputs())[:, 0]
        count = differences.new_tensor(0.0 if batch.is_filler else len(differences))
        sums: Any = torch.stack([differences.sum() * (not batch.is_filler), count])
        total, number = self.accelerator.reduce(sums, reduction="sum").unbind()
        return (total / number.clamp(min=1)).clamp(min=0)


class LabelledPreparation(Preparation):
    """Single answers, tokenised, with their labels."""

    def split(self, dataset: Any, name: str, *, repeat: bool = False) -> Any:
        if dataset is None or isinstance(dataset, Mapping):
            return super().split(dataset, name, repeat=repeat)
        check_answers("train_dataset" if name == "train" else "eval_dataset", dataset)
        labels = dataset["label"][:]
        tokenised = super().split(dataset.remove_columns("label"), name)
        # a record's id is its place in the data set: some are left out
        return tokenised.add_column("label", [bool(labels[i]) for i in tokenised["pair_id"]])


class UnpairedCollator(CompletionCollator):
    """Records of completions with their label -> their rows and, for the KL term, the same prompts with the answer of
    the record before, the first one with the last one's.

    Args:
        pad_token_id, pad_to_multiple_of: as `CompletionCollator`.
        with_mismatched: make that second batch, `batch.mismatched`.
        max_length: of its rows, in tokens.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        *,
        with_mismatched: bool,
        max_length: int | None = None,
    ) -> None:
        super().__init__(pad_token_id, pad_to_multiple_of)
        self._with_mismatched, self._max_length = with_mismatched, max_length

    def __call__(self, records: list[dict[str, Any]]) -> Batch:
        batch = super().__call__(records)
        # the records that a checkpoint's probe makes have none, and only their log-probs are read; data all have one
        batch["labels"] = torch.tensor([record.get("label", True) for record in records])
        if self._with_mismatched:
            batch["mismatched"] = super().__call__(
                [self._with_answer(record, records[i - 1]["chosen_ids"]) for i, record in enumerate(records)]
            )
        return batch

    def _with_answer(self, record: dict[str, Any], answer_ids: list[int]) -> dict[str, Any]:
        room = None if self._max_length is None else max(1, self._max_length - len(record["prompt_ids"]))
        return {**record, "chosen_ids": answer_ids[:room]}


def _kind(policy: Any, ref_model: Any, *, is_new_adapter: bool) -> Kind:
    if ref_model is not None:
        return Kind.SECOND_MODEL
    if not isinstance(policy, PeftModel):
        return Kind.COPY
    is_off = adapter_changes_nothing(policy, is_new=is_new_adapter)
    return Kind.ADAPTER_OFF if is_off else Kind.START_WEIGHTS


def _check_arguments(ref_model: Any, data_collator: Any, compute_metrics: Any) -> None:
    if isinstance(ref_model, str):
        raise ValueError(f"ref_model: expected a model that is loaded, or None, got {ref_model!r}. Load it first.")
    for name, value in (("data_collator", data_collator), ("compute_metrics", compute_metrics)):
        if value is not None:
            raise ValueError(f"{name}: expected None, got {type(value).__name__}. Leave it out; see KTOTrainer.")


def check_answers(name: str, dataset: Any) -> None:
    """
    Raises:
        ValueError: a data set is streamed, is not one of single answers, or a label is neither true nor false.
    """
    if isinstance(dataset, Mapping):
        for part_name, part in dataset.items():
            check_answers(f"{name} {part_name!r}", part)
        return
    if dataset is None:
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name}: expected a Dataset, got {type(dataset).__name__}. Load it whole.")
    missing = [column for column in _COLUMNS if column not in dataset.column_names]
    if missing or "rejected" in dataset.column_names:
        raise ValueError(
            f"{name}: expected the columns {', '.join(_COLUMNS)}, got {', '.join(dataset.column_names)}. Pairs of "
            "chosen and rejected answers are DPOPTrainer's; trl.unpair_preference_dataset takes them apart."
        )
    for i, label in enumerate(dataset["label"]):
        if label is None or label not in (True, False):
            raise ValueError(f"{name}: expected label to be true or false, got {label!r} in record {i}. Correct it.")


def _tell_of_balance(dataset: Dataset, args: KTOConfig) -> None:
    """Say whether both sides weigh about the same, as the paper asks of the weights of its equation 8."""
    num_desirable = sum(dataset["label"])
    num_undesirable = len(dataset) - num_desirable
    desirable, undesirable = args.desirable_weight * num_desirable, args.undesirable_weight * num_undesirable
    if undesirable <= desirable <= undesirable * 4 / 3:
        return
    balanced = f"; {undesirable / num_desirable:.3g} balances them" if num_desirable and num_undesirable else ""
    logger.warning(
        "desirable_weight %g: %d desirable and %d undesirable answers weigh as %.4g to %.4g, where the paper asks for "
        "1 to 4/3 of the latter%s.",
        args.desirable_weight,
        num_desirable,
        num_undesirable,
        desirable,
        undesirable,
        balanced,
    )
