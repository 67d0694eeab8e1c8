"""From values to places along an axis, and the round numbers that are written there."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from dpop_trainer.report.signed import minus


class Axis(NamedTuple):
    """What is drawn along an axis."""

    label: str = ""
    low: float | None = None
    """Where it begins; None: at the lowest value."""
    high: float | None = None
    log: bool = False
    whole: bool = False
    """Ticks at whole numbers alone."""
    ticks: tuple[tuple[float, str], ...] = ()
    """Values and what stands there, where round numbers would not do."""


class Scale(NamedTuple):
    """From values to coordinates."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], axis: Axis, begin: float, end: float, *, room: float = 0.0) -> "Scale":
        """The axis's own ends, else those of the values and a share of their range beyond."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not axis.log)]
        low, high = min(finite, default=1.0 if axis.log else 0.0), max(finite, default=1.0)
        if axis.log:
            # from a power of ten to a power of ten, so that the scale is always labelled
            low, high = 10.0 ** math.floor(math.log10(low) - 0.05), 10.0 ** math.ceil(math.log10(high) + 0.05)
        beyond = 0.0 if axis.log else room * (high - low)
        low = low - beyond if axis.low is None else axis.low
        high = high + beyond if axis.high is None else axis.high
        if not high > low:
            # half a step around a single value where none of the ends is given
            low, high = (low - 0.5, low + 0.5) if axis.low is None else (low, low + 1.0)
            if not high > low:
                high = math.nextafter(low, math.inf)
        return cls(low, high, begin, end, axis.log)

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.log else value
        return self.begin + (place - low) / (high - low) * (self.end - self.begin)

    def ticks(self, axis: Axis, most: int) -> list[tuple[float, str]]:
        """Values and their texts, at most `most` + 1 of them."""
        if axis.ticks:
            return [(value, text) for value, text in axis.ticks if self.low <= value <= self.high]
        if self.log:
            powers = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [(10.0**power, number(10.0**power)) for power in powers[:: math.ceil(len(powers) / (most + 1))]]
        found = round_numbers(self.low, self.high, most)
        return [(value, number(value)) for value in found if not axis.whole or value == int(value)]


def number(value: float) -> str:
    """Four significant digits, thousands and millions abbreviated, a true minus, powers of ten as such."""
    size = abs(value)
    if size >= 1e9:
        told = f"{value:.3g}"
    elif size >= 1e6:
        told = f"{value / 1e6:.4g}M"
    elif size >= 1e4:
        told = f"{value / 1e3:.4g}k"
    else:
        told = f"{value + 0.0:,.4g}"
    mantissa, _, exponent = told.partition("e")
    if exponent:
        power = f"10{str(int(exponent)).translate(_RAISED)}"
        told = f"{mantissa}·{power}" if mantissa.lstrip("-") != "1" else mantissa.replace("1", power)
    return minus(told)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """From low to high, at most `most` + 1."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
