"""Pairs to a file, JSONL or Parquet. The file appears under its name only when it is complete."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from dpop_trainer.data.partial_files import partial_of

_ROW_GROUP = 1000


class PairWriter:
    """Writes records of one set of fields, a thousand at a time at most in memory.

    Use as a context manager: leaving it normally puts the file into place, an exception leaves nothing behind.

    Args:
        path: ends in .jsonl or .parquet; replaced if it exists, missing folders are made.

    Raises:
        ValueError: another ending.
    """

    _partial: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out: expected a file ending in .jsonl or .parquet, got {self.path}.")
        self._rows: list[dict[str, Any]] = []
        self._out: Any = None

    def __enter__(self) -> "PairWriter":
        self._partial = partial_of(self.path)
        if self.path.suffix == ".jsonl":
            self._out = self._partial.open("w", encoding="ascii")
        return self

    def write(self, record: dict[str, Any]) -> None:
        """Take down one record, with the fields of the first."""
        if self.path.suffix == ".jsonl":
            self._out.write(json.dumps(record) + "\n")  # escaped: a raw U+2028 ends the line for some readers
            return
        self._rows.append(record)
        if len(self._rows) == _ROW_GROUP:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._rows:
                self._flush()
            if self._out is not None:
                self._out.close()
            if kind is None and self._out is not None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._out is None:
            self._out = pq.ParquetWriter(str(self._partial), _schema(self._rows[0]))
        self._out.write_table(pa.Table.from_pylist(self._rows, schema=self._out.schema))
        self._rows.clear()


def _schema(record: dict[str, Any]) -> Any:
    """The types of a pair's fields. A field that is null in the first record is a text."""
    import pyarrow as pa

    def type_of(value: Any) -> Any:
        if isinstance(value, list):
            return pa.list_(pa.struct([(key, pa.string()) for key in value[0]]))
        return pa.int64() if isinstance(value, int) else pa.string()

    return pa.schema([(name, type_of(value)) for name, value in record.items()])
