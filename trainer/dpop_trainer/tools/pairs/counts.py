"""What became of the records that pairs were built from."""

from collections import Counter
from dataclasses import dataclass, field

_MAX_NAMED = 5


@dataclass
class PairCounts:
    """What became of the records read so far."""

    built: int = 0
    """Pairs built."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records that gave no pair, by reason."""
    read: int = 0
    """Records read."""
    bad: int = 0
    """Records that could not be used, with on_bad_record="skip"."""
    first_bad: list[str] = field(default_factory=list)
    """The first five of them: where they stand and what is wrong."""

    def add_bad(self, problem: str) -> None:
        """Count a record that cannot be used, and keep its description if it is among the first."""
        self.bad += 1
        if len(self.first_bad) < _MAX_NAMED:
            self.first_bad.append(problem)

    def __str__(self) -> str:
        reasons = "".join(f"; {count} skipped: {reason}" for reason, count in sorted(self.skipped.items()))
        bad = f"; {self.bad} bad records skipped" if self.bad else ""
        return f"{self.built} pairs built{reasons}{bad}"
