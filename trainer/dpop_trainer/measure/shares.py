"""Shares of pairs with what their number leaves open, so that 52 % of 241 pairs is not called a preference learned."""

import math
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


class Interval(NamedTuple):
    """In which a share lies with `CONFIDENCE`."""

    low: float
    high: float

    @property
    def is_chance(self) -> bool:
        """A coin would do as well."""
        return self.low <= 0.5 <= self.high


def share_interval(share: float, count: int) -> Interval:
    """
    Args:
        share: of so many independent items, from 0 to 1.
        count: how many, at least 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", the score interval.
    """
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def with_interval(share: float, count: int) -> str:
    """ "52.3 % (46.0 to 58.5)" """
    low, high = share_interval(share, count)
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
