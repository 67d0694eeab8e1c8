"""What a pair counts for in the loss, where its record says so.

    weight          the record's own number; 1 where there is none
    score_margin    how much better the chosen answer was judged: the column of that name, or the scores' difference
    none            every pair counts the same

The loss is a weighted mean, so that a common factor changes nothing.
"""

import math
from typing import Any, Literal, get_args

PairWeight = Literal["weight", "score_margin", "none"]

WEIGHT_COLUMN = "weight"
MARGIN_COLUMN = "score_margin"


def read_weight(record: dict[str, Any]) -> float | None:
    """A record's own weight as it stands there: None where there is none, NaN for what is no number."""
    value = record.get(WEIGHT_COLUMN)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer beyond fp64
        return math.inf


def weight_of(rule: PairWeight, weight: float | None, score_gap: float | None) -> float:
    """
    Args:
        rule: where weights come from.
        weight: from `read_weight`.
        score_gap: how much better the chosen answer was judged, where the record says so.

    Raises:
        ValueError: the record has no such weight, or one that is negative or not finite.
    """
    if rule == "none":
        return 1.0
    if rule == "weight":
        weight = 1.0 if weight is None else weight
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"weight: expected a finite number >= 0, got {'no number' if math.isnan(weight) else weight}. Correct "
                "it: 1 is an ordinary pair, 0 one that is left out."
            )
        return weight
    if score_gap is None:
        raise ValueError(
            "score_margin: expected a finite margin, or scores of both answers, got none. Add them, or leave "
            "pair_weight out."
        )
    if score_gap < 0:
        raise ValueError(
            f"score_margin: expected the chosen answer to be judged the better one, got {score_gap}. Swap the answers, "
            "or remove the record."
        )
    return score_gap


def check_pair_weight(rule: str) -> None:
    """
    Raises:
        ValueError: there is no such rule.
    """
    if rule not in get_args(PairWeight):
        raise ValueError(f"pair_weight: expected one of {', '.join(get_args(PairWeight))}, got {rule!r}.")
