"""The list of the records that a run left out, one JSON line each: skipped_records.jsonl."""

import json
from pathlib import Path

from dpop_trainer.data.records import BadRecord

SKIPPED_FILE = "skipped_records.jsonl"


class SkippedRecords:
    """Writes down every record that is left out, once, however often it is met.

    Args:
        folder: of the run; made when there is something to write. None: nothing is written.
        clear: remove what an earlier run wrote there.
    """

    def __init__(self, folder: str | Path | None, *, clear: bool = False) -> None:
        self._path = None if folder is None else Path(folder) / SKIPPED_FILE
        self._written: set[tuple[str, str]] = set()
        if clear and self._path is not None:
            self._path.unlink(missing_ok=True)

    def add(self, dataset: str, bad_records: list[BadRecord]) -> list[BadRecord]:
        """
        Args:
            dataset: which of the run's data sets: "train", "eval", or an evaluation set's name.
            bad_records: what was left out.

        Returns:
            Those that had not been met before.
        """
        new = [bad for bad in dict.fromkeys(bad_records) if (dataset, bad.place) not in self._written]
        if self._path is not None and new:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a" if self._written else "w", encoding="utf-8") as file:
                for bad in new:
                    file.write(json.dumps({"dataset": dataset, "place": bad.place, "reason": bad.reason}) + "\n")
        self._written |= {(dataset, bad.place) for bad in new}
        return new
