"""Records to build pairs of, one at a time, from wherever pairs are read, with their licence and how far it is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpop_trainer.data.read_json import read_json_records
from dpop_trainer.data.records import BadRecord
from dpop_trainer.data.sample import Item
from dpop_trainer.data.source_path import check_source_path, expanded, is_json


@dataclass
class Source:
    """Records, or what stands there instead, to be read once."""

    name: str
    path: Path | None
    """None for the hub."""
    size: int | None
    """Of the whole source, in `unit`."""
    unit: str
    """"B" (bytes) or "records"."""
    license: str | None = None
    """What the hub says."""
    items: Iterable[Item] = ()
    consumed: int = 0
    """How much of the source has been read, in its unit."""

    def __iter__(self) -> Iterator[Item]:
        for number, item in enumerate(self.items, start=1):
            if self.unit == "records":
                self.consumed = number
            yield item

    def reached(self, position: int) -> None:
        """So many bytes have been read."""
        self.consumed = position


def open_source(source: str, *, split: str = "train", config: str | None = None) -> Source:
    """A source by name, which is streamed. JSON needs no `datasets`.

    Args:
        source: a file or folder of the kinds that `load_pairs` reads, or a hub id.
        split: of a hub data set or a folder.
        config: of a hub data set that has several.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ValueError: the file is of another kind, or cannot be read.
    """
    check_source_path(source, split)
    path = expanded(source)
    if is_json(path):
        opened = Source(path.name, path, path.stat().st_size, "B")
        opened.items = read_json_records(path, on_position=opened.reached)
        return opened
    return _data_set(source, path if path.exists() else None, split, config)


def record_of(item: Item) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no record; what stands there.
    """
    if isinstance(item, BadRecord):
        raise ValueError(item.reason)
    return item.record


def license_of(path: Path) -> tuple[str, Path] | None:
    """The licence that lies beside a file -> its title and where it is: LICENSE.<name>, LICENSE, COPYING."""
    stem = path.name.partition(".")[0]
    for name in (f"LICENSE.{stem}", "LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING"):
        candidate = path.with_name(name)
        if candidate.is_file():
            lines = candidate.read_text(encoding="utf-8", errors="replace").splitlines()
            titles = [line.strip(" \t#*/") for line in lines if line.strip(" \t#*/")]
            if titles:
                # "Apache License" / "Version 2.0, January 2004"
                second = titles[1] if len(titles) > 1 and titles[1].lower().startswith("version") else ""
                return ", ".join(filter(None, [titles[0], second])), candidate
    return None


def _data_set(source: str, path: Path | None, split: str, config: str | None) -> Source:
    from dpop_trainer.data.load import open_source as open_data_set
    from dpop_trainer.data.read import stream_items

    opened: Any = open_data_set(source, split, config, streaming=True)
    info = getattr(opened, "info", None)  # a folder may hold a dict of splits
    in_split = info.splits.get(split) if info is not None and info.splits else None
    size = in_split.num_examples if in_split else None
    if path is not None and path.suffix == ".parquet":
        import pyarrow.parquet as pq

        size = pq.read_metadata(path).num_rows
    license = (info.license or None) if info is not None else None
    items = stream_items(opened, split, origin=source)
    return Source(path.name if path else source, path, size or None, "records", license, items)
