"""A Trainer whose ranks share every epoch and every evaluation exactly: no pair is repeated to fill a last round."""

from typing import Any

from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import DataLoader

from dpop_trainer.batches.sequence_shares import SharedCollator
from dpop_trainer.batches.shares import FillerCollator, RankShares, WithFillers
from dpop_trainer.training.sequence_parallel import SequenceParallel

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


class ExactShares(SequenceParallel):
    """transformers.Trainer with `shares.RankShares` in place of accelerate's padded shards."""

    def dealt_out(self, loader: Any) -> Any:
        group = self.sequence_group
        if group is not None and isinstance(loader.dataset, IterableDatasetShard):
            dataset = loader.dataset
            dataset.num_processes, dataset.process_index = self.num_data_ranks, dataset.process_index // group.size
            loader.base_dataloader.collate_fn = SharedCollator(loader.collate_fn, group)
            return loader
        shard = getattr(loader, "batch_sampler", None)
        if not isinstance(shard, BatchSamplerShard) or shard.split_batches or isinstance(loader.dataset, WithFillers):
            return loader
        collate, rank = loader.collate_fn, shard.process_index
        if group is not None:
            collate, rank = SharedCollator(collate, group), rank // group.size
        # the loader around it goes on placing batches, seeding epochs and telling where they end
        loader.base_dataloader = DataLoader(
            WithFillers(loader.dataset),  # type: ignore[arg-type]
            batch_sampler=RankShares(shard.batch_sampler, num_ranks=self.num_data_ranks, rank=rank),
            collate_fn=FillerCollator(collate),
            **{name: getattr(loader, name) for name in _LOADER_OPTIONS},
        )
        return loader
