"""The pairs under examination: checked, read one at a time or by row, in every form that `dpop train` reads."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from dpop_trainer.data import read_pairs
from dpop_trainer.data.convert import bad_records, row_pair
from dpop_trainer.data.pair_weights import WEIGHT_COLUMN, weight_of
from dpop_trainer.data.read import stream_items
from dpop_trainer.data.records import TIE, BadRecord, raise_bad_records
from dpop_trainer.data.tokenise import SKIP_REMEDY, OnBadRecord
from dpop_trainer.settings.wording import counted

_BATCH = 1000


class PairFile(NamedTuple):
    """The pairs of a file that can be used, every one of them, and what else it holds."""

    source: str
    split: str
    config: str | None
    dataset: Dataset
    """One row per pair, from `read_pairs`: what `tokenise_pairs` takes. Memory-mapped."""
    form: str
    """text, messages or tokens."""
    numbers: NDArray[np.int64]
    """[n] where each pair stands among all records of the file, from 0."""
    num_records: int
    bad: list[BadRecord]
    """Records that cannot be used."""
    num_ties: int
    """Records that prefer neither answer."""

    @classmethod
    def open(
        cls, source: str, split: str = "train", config: str | None = None, *, on_bad_record: OnBadRecord = "skip"
    ) -> "PairFile":
        """
        Raises:
            FileNotFoundError: there is no such file, folder or hub data set.
            ValueError: it cannot be read; there is no pair that can be used, or, with on_bad_record "error", a record
                that cannot. Names such records.
        """
        rows = read_pairs(source, split, name=config)
        bad = bad_records(rows)
        kinds = np.array(rows["kind"][:], dtype=object)
        is_pair = np.array([kind is not None and kind != TIE for kind in kinds], np.bool_)
        unweighable = _unweighable(rows, is_pair)
        if unweighable:
            is_pair[list(unweighable)] = False
            places = rows.select(list(unweighable))["place"]
            bad += [BadRecord(place, why) for place, why in zip(places, unweighable.values(), strict=True)]
        num_ties = int((kinds == TIE).sum())
        if on_bad_record == "error" or not is_pair.any():
            raise_bad_records("pairs", len(rows), bad, SKIP_REMEDY if is_pair.any() else "")
        if not is_pair.any():
            raise ValueError(
                f"source: expected at least one pair, got none in {source}"
                + (f", but {counted(num_ties, 'tie')}." if num_ties else ".")
            )
        numbers = np.flatnonzero(is_pair)
        used = rows if is_pair.all() else rows.select(numbers)
        return cls(
            source,
            split,
            config,
            used,
            " and ".join(sorted(used.unique("kind"))),
            numbers,
            len(rows),
            bad,
            num_ties,
        )

    def without(self, refused: list[BadRecord]) -> "PairFile":
        """The same file less pairs that a tokenizer or a model cannot use."""
        places = {bad.place for bad in refused}
        kept = [i for i, place in enumerate(self.dataset["place"][:]) if place not in places]
        return self._replace(dataset=self.dataset.select(kept), numbers=self.numbers[kept], bad=[*self.bad, *refused])

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
        """[n] each pair's own weight, 1 where its record has none."""
        return _weights(self.dataset)

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of the pairs as they were, all fields."""
        numbers = iter(map(int, self.numbers))
        wanted = next(numbers, None)
        for number, item in enumerate(stream_items(self.source, self.split, name=self.config)):
            if number == wanted:
                assert not isinstance(item, BadRecord)  # else it would be among the bad ones
                yield item.record
                wanted = next(numbers, None)


def _weights(dataset: Dataset) -> NDArray[np.float64]:
    column = dataset.select_columns(WEIGHT_COLUMN).with_format("arrow")[:][WEIGHT_COLUMN]
    return pc.fill_null(column, 1.0).to_numpy()


def _unweighable(dataset: Dataset, is_pair: NDArray[np.bool_]) -> dict[int, str]:
    """Pairs whose own weight is none that `dpop train` takes -> its sentence."""
    weights = _weights(dataset)
    problems = {}
    for row in np.flatnonzero(is_pair & ~((weights >= 0) & (weights < np.inf))):
        try:
            weight_of("weight", float(weights[row]), None)
        except ValueError as error:
            problems[int(row)] = str(error)
    return problems


def rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A data set's rows, a thousand at a time in memory."""
    for batch in dataset.with_format(None).iter(_BATCH):
        columns = dict(batch)  # type: ignore[arg-type]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
