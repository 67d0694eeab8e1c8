"""A HeadTrainer that can fill its training batches up to a budget of positions, however many pairs that makes."""

import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker

from dpop_trainer.batches import Budget, BudgetBatchSampler, PairCollator, plan_batches
from dpop_trainer.settings.config import DPOPConfig
from dpop_trainer.training.base import HeadTrainer

logger = logging.getLogger(__name__)


class BudgetTrainer(HeadTrainer):
    """HeadTrainer whose batches follow a plan once `plan_batches` has been called, and are transformers' until then."""

    args: DPOPConfig  # type: ignore[assignment]

    _budget_batches: BudgetBatchSampler | None = None

    def get_train_dataloader(self) -> DataLoader:
        if self._budget_batches is None:
            return super().get_train_dataloader()
        args = self.args
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self._budget_batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        return self.dealt_out(self.accelerator.prepare(loader))

    def get_total_train_batch_size(self, args: Any) -> int:
        batches = self._budget_batches
        if batches is None:
            return super().get_total_train_batch_size(args)
        return round(batches.num_pairs / len(batches) * args.gradient_accumulation_steps * self.num_data_ranks)

    def plan_batches(self, max_positions: int) -> None:
        """Plan the training batches of every epoch, and say what they hold.

        Raises:
            ValueError: a pair alone needs more positions than the budget.
        """
        args, collator = self.args, self.data_collator
        assert isinstance(collator, PairCollator)
        if collator.layout == "auto":  # rows would need more positions than the trees that are planned for
            collator = self.data_collator = replace(collator, layout="packed")
        budget = Budget(max_positions, collator.layout, collator.pad_to_multiple_of)  # type: ignore[arg-type]
        self._budget_batches = batches = plan_batches(
            self.train_dataset,  # type: ignore[arg-type]
            budget,
            prefix_sharing=args.prefix_sharing,
            group_by_prompt=args.group_by_prompt,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            num_processes=self.num_data_ranks,
            num_epochs=None if args.max_steps > 0 else math.ceil(args.num_train_epochs),
            num_batches=args.max_steps * args.gradient_accumulation_steps * self.num_data_ranks,
        )
        self.add_callback(_EpochOfBatches(batches))
        logger.warning(
            "Batches: %d per epoch, of %.1f pairs and %.0f of at most %d positions on average (layout %s).",
            len(batches),
            batches.num_pairs / len(batches),
            batches.mean_positions,
            max_positions,
            budget.layout,
        )


class _EpochOfBatches(TrainerCallback):
    """Tells the plan its epoch. transformers does not reach it behind what skips batches on resuming and what shards
    them."""

    def __init__(self, batches: BudgetBatchSampler) -> None:
        self._batches = batches

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._batches.set_epoch(int(state.epoch or 0))
