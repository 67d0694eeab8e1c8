"""A Trainer whose ranks share every epoch and every evaluation exactly: no pair is repeated to fill a last round."""

from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from dpop_trainer.batches.shares import FillerCollator, RankShares, WithFillers
from dpop_trainer.training.hf_hooks import HfHooks

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


class ExactShares(HfHooks):
    """transformers.Trainer with `shares.RankShares` in place of accelerate's padded shards."""

    def dealt_out(self, loader: Any) -> Any:
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
