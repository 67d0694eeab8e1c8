"""The data sets of a mixture as YAML and the command line name them.

The fields are those of TRL's `DatasetConfig` where it has them; `weight`, `num_pairs` and `label` are ours.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
