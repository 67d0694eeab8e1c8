"""How the batches of an epoch are dealt to the ranks, so that every pair is trained on exactly once.

accelerate completes the last round by starting the data set over, which counts some pairs twice. Here the pairs that
are left are spread over all ranks. A rank that none is left for runs along with a pair that does not count: wrappers
that shard weights need every rank at every forward.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import BatchSampler

from dpop_trainer.batches.batch import FILLER_KEY, Batch, as_batch


class RankShares(BatchSampler):
    """One rank's batches: the n-th of every `num_ranks` in a row, and an even share of what is left over.

    Over all ranks, the i-th batches hold the pairs of `num_ranks` batches in a row, as one process with batches
    `num_ranks` times as large has them.

    Args:
        batch_sampler: the batches of all ranks, the same on each; only the last may be smaller.
        num_ranks: how many ranks there are.
        rank: which one this is.
    """

    def __init__(self, batch_sampler: Any, *, num_ranks: int, rank: int) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes, self.process_index = num_ranks, rank  # accelerate counts global batches with these
        self.batch_size: Any = getattr(batch_sampler, "batch_size", None)
        self.drop_last = getattr(batch_sampler, "drop_last", False)

    def set_epoch(self, epoch: int) -> None:
        """Let the sampler below shuffle as in this epoch, also where accelerate skips what a resumed run has done."""
        samplers: tuple[Any, Any] = (self.batch_sampler, getattr(self.batch_sampler, "sampler", None))
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.batch_sampler), self.num_processes)
        return full + int(rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices into the data set; -1 - i stands for record i as a filler."""
        together: list[list[int]] = []
        for batch in self.batch_sampler:
            together.append(batch)
            if len(together) == self.num_processes:
                yield together[self.process_index]
                together = []
        if together and not self.drop_last:
            left = [index for batch in together for index in batch]
            share = left[self.process_index :: self.num_processes]
            yield share or [-1 - left[0]]


class WithFillers:
    """A map-style data set in which the index -1 - i is record i, marked as a filler."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[-1 - index], FILLER_KEY: True} if index < 0 else self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if min(indices) < 0:
            return [self[index] for index in indices]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]


class FillerCollator:
    """A collator that is not shown the marks of fillers; the batch carries them instead."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self._collate = collate

    def __call__(self, records: list[dict[str, Any]]) -> Batch:
        marks = [record.get(FILLER_KEY, False) for record in records]
        assert all(marks) or not any(marks), marks
        if not any(marks):
            return as_batch(self._collate(records))
        batch = self._collate([{key: value for key, value in r.items() if key != FILLER_KEY} for r in records])
        return Batch(batch, **{FILLER_KEY: True})
