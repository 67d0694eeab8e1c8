"""The pairs under examination: checked, read one at a time or by row, in every form that `dpop train` reads."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from dpop_trainer.data import read_pairs
from dpop_trainer.data.convert import bad_records, row_pair
from dpop_trainer.data.pair_weights import WEIGHT_COLUMN
from dpop_trainer.data.read import stream_items
from dpop_trainer.data.records import BadRecord, raise_bad_records

_BATCH = 1000


class PairFile(NamedTuple):
    """Pairs that can be used, every one of them."""

    source: str
    split: str
    config: str | None
    dataset: Dataset
    """One row per record, from `read_pairs`: what `tokenise_pairs` takes. Memory-mapped."""
    form: str
    """text, messages or tokens."""

    @classmethod
    def open(cls, source: str, split: str = "train", config: str | None = None) -> "PairFile":
        """
        Raises:
            FileNotFoundError: there is no such file, folder or hub data set.
            ValueError: it cannot be read, or records cannot be used; names them.
        """
        rows = read_pairs(source, split, name=config)
        raise_bad_records("pairs", len(rows), bad_records(rows))
        if not len(rows):
            raise ValueError(f"source: expected at least one pair, got none in {source}.")
        return cls(source, split, config, rows, " and ".join(sorted(rows.unique("kind"))))

    @property
    def num_pairs(self) -> int:
        return len(self.dataset)

    def pairs(self) -> Iterator[Any]:
        """Each pair as `records` reads it: TextPair, MessagesPair or PairIds."""
        return (row_pair(row["kind"], row["pair"]) for row in rows_of(self.dataset.select_columns(["kind", "pair"])))

    def pair(self, row: int) -> Any:
        """One of them."""
        values = self.dataset[row]
        return row_pair(values["kind"], values["pair"])

    def weights(self) -> NDArray[np.float64]:
        """[n] each pair's own weight, 1 where its record has none; NaN for what is no number."""
        column = self.dataset.select_columns(WEIGHT_COLUMN).with_format("arrow")[:][WEIGHT_COLUMN]
        return pc.fill_null(column, 1.0).to_numpy()

    def records(self) -> Iterator[dict[str, Any]]:
        """The records as they were, all fields."""
        for item in stream_items(self.source, self.split, name=self.config):
            assert not isinstance(item, BadRecord)  # `open` has refused the file
            yield item.record


def rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A data set's rows, a thousand at a time in memory."""
    for batch in dataset.with_format(None).iter(_BATCH):
        columns = dict(batch)  # type: ignore[arg-type]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
