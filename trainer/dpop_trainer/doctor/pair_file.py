"""The pairs under examination, as `load_pairs` gives them: checked, read one at a time or by row, in any form."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets import Dataset

from dpop_trainer.data import check_pairs, load_pairs
from dpop_trainer.data.records import PAIR_READERS, Form, used_columns

_BATCH = 1000


class PairFile(NamedTuple):
    """Pairs that can be used, every one of them."""

    source: str
    dataset: Dataset
    """As loaded, with whatever columns it has: what `tokenise_pairs` takes."""
    form: Form

    @classmethod
    def open(cls, source: str, split: str = "train", config: str | None = None) -> "PairFile":
        """
        Raises:
            FileNotFoundError: there is no such file, folder or hub data set.
            ValueError: it cannot be read, or records cannot be used; names them.
        """
        dataset = load_pairs(source, split, name=config)
        return cls(source, dataset, check_pairs(dataset))

    @property
    def num_pairs(self) -> int:
        return len(self.dataset)

    def pairs(self) -> Iterator[Any]:
        """Each pair as `records` reads it: TextPair, MessagesPair or PairIds."""
        read = PAIR_READERS[self.form]
        return (read(record) for record in rows_of(self.dataset.select_columns(used_columns(self.dataset))))

    def pair(self, row: int) -> Any:
        """One of them."""
        return PAIR_READERS[self.form](self.dataset.with_format(None)[row])

    def records(self) -> Iterator[dict[str, Any]]:
        """The records as they were, all columns."""
        return rows_of(self.dataset)


def rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A data set's rows, a thousand at a time in memory."""
    for batch in dataset.with_format(None).iter(_BATCH):
        columns = dict(batch)  # type: ignore[arg-type]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
