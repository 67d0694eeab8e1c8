"""Several data sets, each in a form of its own, as one: drawn by share, weight or number, the same for the same seed.

The fields are those of TRL's `DatasetConfig` where it has them; `weight`, `num_pairs` and `label` are ours.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from dpop_trainer.data.read import read_pairs
from dpop_trainer.data.stream import MixedStream, Part, RowStream, SourceStream

_logger = logging.getLogger(__name__)

_SYNONYMS = {"id": "path", "config": "name"}


@dataclass(frozen=True)
class DatasetSource:
    """One data set of a mixture.

    Raises:
        ValueError: a value outside its range, or two ways to say how much is taken.
    """

    path: str
    """A local file or folder, or a hub id."""
    name: str | None = None
    """The configuration of a hub data set that has several."""
    split: str = "train"
    """Which split."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    label: str | None = None
    """What messages and metrics call it; by default the path's last part."""
    fraction: float | None = None
    """Share of the mixture; shares are divided by their sum, and no data set is repeated to reach its own. For all or
    none."""
    weight: float | None = None
    """How often each record is seen per epoch: 2 is twice, 0.5 is a random half."""
    num_pairs: int | None = None
    """So many records, drawn at random."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"path: expected a file, a folder or a hub id, got {self.path!r}.")
        amounts = {"fraction": self.fraction, "weight": self.weight, "num_pairs": self.num_pairs}
        given = {field: amount for field, amount in amounts.items() if amount is not None}
        if len(given) > 1:
            raise ValueError(f"{self.path}: expected one of fraction, weight and num_pairs, got {given}. Remove one.")
        for field, amount in given.items():
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
                raise ValueError(f"{self.path}: {field}: expected a number > 0, got {amount!r}.")
        if self.num_pairs is not None and self.num_pairs != int(self.num_pairs):
            raise ValueError(f"{self.path}: num_pairs: expected a whole number, got {self.num_pairs!r}.")

    @property
    def shown(self) -> str:
        """Its label or, without one, the path's last part less its ending."""
        return self.label or Path(self.path).name.split(".")[0] or self.path


def parse_sources(values: Any, field: str) -> list[DatasetSource]:
    """Sources as YAML or the command line gives them: mappings, their JSON, or bare paths.

    Args:
        values: a list of them.
        field: where they were given, for messages.

    Raises:
        ValueError: a key is unknown, a value outside its range, or `fraction` is given for some only.
    """
    if not isinstance(values, list) or not values:
        raise ValueError(f"{field}: expected a list of data sets, got {values!r}. Give each a path.")
    sources = [_parse_source(value, f"{field}[{index}]") for index, value in enumerate(values)]
    with_fraction = [source.fraction is not None for source in sources]
    if any(with_fraction) and not all(with_fraction):
        raise ValueError(f"{field}: expected fraction for all data sets or for none, got it for {sum(with_fraction)}.")
    return sources


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


def _parse_source(value: Any, field: str) -> DatasetSource:
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"{field}: expected a path or a JSON object, got {value!r} ({error}).") from error
        else:
            value = {"path": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{field}: expected a mapping with a path, got {value!r}.")
    known = [item.name for item in fields(DatasetSource)]
    options: dict[str, Any] = {_SYNONYMS.get(key, str(key)): item for key, item in value.items()}
    unknown = [key for key in options if key not in known]
    if unknown or "path" not in options:
        raise ValueError(f"{field}: expected path and any of {', '.join(known[1:])}, got {sorted(map(str, value))}.")
    try:
        return DatasetSource(**options)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


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
