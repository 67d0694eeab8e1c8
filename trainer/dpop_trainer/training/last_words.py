"""What a run of the command line ends with: what became of the chosen answers, what was left out, what to do next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpop_trainer.report.signed import signed
from dpop_trainer.training.watch import CHOSEN_KEY

ACCURACY_KEY = "rewards/accuracies"
LEFT_OUT = ("train_data/dropped_", "train_data/skipped_")


def last_words(
    folder: Path, log_history: Sequence[Mapping[str, Any]], counts: Mapping[str, float], held_out: str | None
) -> list[str]:
    """Lines of a finished run.

    Args:
        folder: where it lies.
        log_history: its log lines; nothing is said of chosen answers where they have no change of theirs.
        counts: "train_data/<count>" of what happened to its pairs.
        held_out: pairs that it was evaluated on, by path or hub id.
    """
    lines, next_step = [], []
    for prefix, which in (("eval_", "held-out pairs"), ("", "the last training pairs")):
        change, accuracy = (_latest(log_history, prefix + key) for key in (CHOSEN_KEY, ACCURACY_KEY))
        if change is not None and accuracy is not None:
            lines = [f"On {which}: chosen Δ {signed(change)} nats an answer, reward accuracy {accuracy:.1%}."]
            pairs = shlex.quote(held_out) if held_out else "PAIRS"
            if held_out and not prefix:
                lines.append("The held-out pairs were not looked at: set eval_strategy to steps or epoch.")
            next_step = [f"Next: dpop inspect {shlex.quote(str(folder))} --pairs {pairs}"]
            break
    lost = sum(count for name, count in counts.items() if name.startswith(LEFT_OUT))
    if lost:
        total = counts["train_data/num_pairs_in"]
        lines.append(f"Not trained on: {lost:,.0f} of {total:,.0f} pairs ({lost / total:.1%}).")
    return [*lines, *next_step]


def _latest(log_history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((line[key] for line in reversed(log_history) if key in line), None)
