"""What became of the records that pairs were built from."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpop_trainer.settings.wording import counted
from dpop_trainer.tools.pairs.recipe import SkippedRecord

if TYPE_CHECKING:
    from dpop_trainer.measure.surface import Surface

_MAX_NAMED = 5


@dataclass
class PairCounts:
    """What became of the records read so far."""

    built: int = 0
    """Pairs built."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records that gave no pair, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> where the first record of those stands, what shows it, and what can be done about it."""
    spared: Counter[str] = field(default_factory=Counter)
    """Pairs whose answer has places in protected spans (by kind) that the rule left as they are."""
    read: int = 0
    """Records read."""
    bad: int = 0
    """Records that could not be used, with on_bad_record="skip"."""
    first_bad: list[str] = field(default_factory=list)
    """The first five of them: where they stand and what is wrong."""

    surface: "Surface | None" = None
    """What tells the two sides of the pairs apart without reading them, once all are built."""

    def add_bad(self, problem: str) -> None:
        """Count a record that cannot be used, and keep its description if it is among the first."""
        self.bad += 1
        if len(self.first_bad) < _MAX_NAMED:
            self.first_bad.append(problem)

    def add_skipped(self, place: str, skipped: SkippedRecord) -> None:
        """Count a sound record that gives no pair, and keep the first of each reason that shows something."""
        reason = str(skipped)
        self.skipped[reason] += 1
        if skipped.example or skipped.remedy:
            shown = f": {skipped.example}" if skipped.example else ""
            self.examples.setdefault(reason, f"{place}{shown}. {skipped.remedy}".rstrip())

    def __str__(self) -> str:
        reasons = "".join(f"; {count:,} skipped: {reason}" for reason, count in sorted(self.skipped.items()))
        bad = f"; {counted(self.bad, 'bad record')} skipped" if self.bad else ""
        spared = "".join(
            f"; {kind} left as they are in {counted(count, 'pair')}" for kind, count in sorted(self.spared.items())
        )
        return f"{counted(self.built, 'pair')} built{reasons}{bad}{spared}"

    def details(self) -> list[str]:
        """A line for each reason that has an example, and for each of the first bad records."""
        return [f"{reason}, as {example}" for reason, example in sorted(self.examples.items())] + self.first_bad
