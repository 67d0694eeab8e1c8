"""Several data sets, each in a form of its own, as one: drawn by share, weight or number, alike for the same seed."""

import logging

import numpy as np
from datasets import Dataset, concatenate_datasets

from dpop_trainer.data.dataset_source import DatasetSource
from dpop_trainer.data.read import read_pairs
from dpop_trainer.data.stream import MixedStream, Part, RowStream, SourceStream

_logger = logging.getLogger(__name__)


def mix_pairs(
    sources: list[DatasetSource], *, seed: int, completions: bool = False, num_proc: int | None = None
) -> Dataset:
    """Read all sources and mix them, in random order.

    Returns:
        Rows as `read_pairs` gives them.

    Raises:
        FileNotFoundError, ValueError: a source cannot be read, or has fewer records than `num_pairs` asks for.
    """
    parts = [
        read_pairs(
            source.path,
            source.split,
            name=source.name,
            revision=source.revision,
            completions=completions,
            num_proc=num_proc,
        )
        for source in sources
    ]
    amounts = _amounts(sources, [len(part) for part in parts])
    generator = np.random.default_rng(seed)
    taken = []
    for source, part, amount in zip(sources, parts, amounts, strict=True):
        repeats, rest = divmod(amount, len(part))
        rows = np.concatenate([np.tile(np.arange(len(part)), repeats), generator.permutation(len(part))[:rest]])
        taken.append(part.select(np.sort(rows)))
        share = amount / max(sum(amounts), 1)
        _logger.warning(
            "mixture: %s: %d of %d records, %.1f%% of the whole", source.shown, amount, len(part), 100 * share
        )
    mixed = concatenate_datasets(taken)
    return mixed.select(generator.permutation(len(mixed)))


def mix_streams(sources: list[DatasetSource], *, seed: int, completions: bool = False) -> RowStream:
    """The same of streams: records are drawn from each by its fraction or weight (1 without one), without end.

    Raises:
        ValueError: when read: a source cannot be read.
    """
    parts = [
        Part(
            SourceStream(
                source.path,
                source.split,
                name=source.name,
                revision=source.revision,
                limit=None if source.num_pairs is None else int(source.num_pairs),
                completions=completions,
            ),
            source.fraction or source.weight or 1.0,
        )
        for source in sources
    ]
    return MixedStream(parts, seed)


def _amounts(sources: list[DatasetSource], sizes: list[int]) -> list[int]:
    """How many records are taken from each."""
    if sources[0].fraction is not None:
        total = sum(source.fraction or 0.0 for source in sources)
        shares = [(source.fraction or 0.0) / total for source in sources]
        whole = min(size / share for size, share in zip(sizes, shares, strict=True))
        return [min(size, max(1, round(whole * share))) for size, share in zip(sizes, shares, strict=True)]
    amounts = []
    for source, size in zip(sources, sizes, strict=True):
        amount = size if source.num_pairs is None else int(source.num_pairs)
        if amount > size:
            raise ValueError(
                f"{source.shown}: num_pairs: expected at most its {size} records, got {amount}. "
                "Use weight to see records more than once."
            )
        amounts.append(max(1, round(amount * (source.weight or 1.0))))
    return amounts
