"""SFTTrainer: supervised fine-tuning through the same head; what preference runs start from."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpop_kernels.losses.pair_loss import segment_sums
from dpop_trainer.batches import Batch
from dpop_trainer.batches.scoring import ScoredModel
from dpop_trainer.data import SkippedRecords
from dpop_trainer.settings.config import SFTConfig
from dpop_trainer.settings.unknown_keywords import answers_unknown_keywords
from dpop_trainer.training.base import HeadTrainer
from dpop_trainer.training.best_metric import check_best_metric
from dpop_trainer.training.policy import policy_to_train
from dpop_trainer.training.split_preparation import Preparation, check_streams


@answers_unknown_keywords(SFTConfig)
class SFTTrainer(HeadTrainer):
    """Fine-tune a causal LM on completions: mean negative log-prob over the completion tokens of the global batch.

    Args:
        model: a causal LM, a peft model, or a name or path to load one from.
        args: `SFTConfig`.
        train_dataset: columns prompt and completion, or preference pairs, whose chosen answers are learned.
        eval_dataset: the same, or a dict of such data sets by name.
        processing_class: the tokenizer. By default loaded from the model's name or path.
        callbacks: transformers callbacks.
        peft_config: wraps the model, for LoRA.
        quantization_config: used when `model` is a name: QLoRA together with peft_config.
        run_config: what the run's config.yaml is to hold; the training arguments by default.

    Raises:
        ValueError: data that cannot be used: what, where, and the remedy.
    """

    args: SFTConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list | None = None,
        peft_config: PeftConfig | None = None,
        *,
        quantization_config: Any = None,
        run_config: dict[str, Any] | None = None,
    ) -> None:
        args = args if args is not None else SFTConfig()
        check_streams(args, train_dataset, eval_dataset)
        may_have_more = bool(callbacks) or type(self) is not SFTTrainer
        check_best_metric(args, eval_dataset, ("entropy", "mean_token_accuracy"), may_have_more=may_have_more)
        policy = policy_to_train(
            model,
            processing_class,
            args,
            quantization_config=quantization_config,
            peft_config=peft_config,
            trains=train_dataset is not None,
        )
        self.preparation = Preparation(
            policy=policy,
            args=args,
            keep_identical=True,
            skipped=SkippedRecords(args.output_dir, clear=train_dataset is not None and args.process_index == 0),
            completions=True,
        )
        train_dataset = self.preparation.split(train_dataset, "train", repeat=True)
        eval_dataset = self.preparation.split(eval_dataset, "eval")
        super().__init__(
            policy.model,
            args,
            data_metrics=self.preparation.counts,
            run_config=run_config,
            losses=["sft"],
            data_collator=CompletionCollator(policy.tokenizer.pad_token_id, args.row_multiple),  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
        )

    def has_own_collator(self) -> bool:
        return True

    def num_items(self, batch: Batch) -> int:
        return batch.target_ids.shape[0]

    def item_losses(self, model: nn.Module, batch: Batch, mode: str):
        logps, stats = ScoredModel(model, self.head).token_logps(batch, batch.model_inputs(), return_stats=True)
        num_tokens = self.num_items(batch)
        sequence_logps = segment_sums(logps, batch.cu_seqlens, backend=self.args.kernel_backend)
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            "entropy": (stats.entropy.sum(), num_tokens),
            "mean_token_accuracy": (stats.is_top1.sum(), num_tokens),
        }
        return -sequence_logps.sum(), ~torch.isfinite(sequence_logps.detach()), metrics


class CompletionCollator:
    """Records with prompt_ids and chosen_ids -> right-padded rows and the positions that score the completions.

    Args:
        pad_token_id: what rows are filled up with; masked.
        pad_to_multiple_of: round the padded length up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self._pad_token_id, self._multiple = pad_token_id, pad_to_multiple_of or 1

    def __call__(self, records: list[dict[str, Any]]) -> Batch:
        rows = [torch.tensor([*record["prompt_ids"], *record["chosen_ids"]]) for record in records]
        length = max(len(row) for row in rows)
        length += -length % self._multiple
        input_ids = torch.full((len(rows), length), self._pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = row
            attention_mask[i, : len(row)] = 1
        starts = [len(record["prompt_ids"]) for record in records]
        lengths = [len(record["chosen_ids"]) for record in records]
        positions = [
            i * length + torch.arange(start - 1, start - 1 + count)  # the token before predicts
            for i, (start, count) in enumerate(zip(starts, lengths, strict=True))
        ]
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            score_positions=torch.cat(positions),
            target_ids=torch.cat([torch.tensor(record["chosen_ids"]) for record in records]),
            cu_seqlens=torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),
            pair_ids=torch.tensor([record["pair_id"] for record in records]),
        )
