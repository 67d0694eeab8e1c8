"""The longest pair that fits, the cheapest setting that fits, and the one nearest to what was asked for."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dpop_trainer.tools.plan.batches import Pairs, longest_length, longest_record, stretched
from dpop_trainer.tools.plan.planner import Choice, Outcome, Planner

MOST_DEVICES = 64
MOST_PAIRS = 64
"""Of a micro-batch that is proposed."""
MOST_TOKENS = 1 << 20
"""Of a micro-batch: no longer pairs are looked for, since laying out that many takes seconds."""
RESERVE = 0.05
"""Of a device's memory, left free by a larger micro-batch that is proposed: no step is worth a run that dies of its
longest batch."""
ROUNDS = 6
"""Of the search for the longest pair."""
STEP = 16
"""Tokens that it is searched in."""
PRECISION = 0.01
"""And of its own length, to which."""


class Found(NamedTuple):
    """What a search came to."""

    cheapest: Outcome | None
    """Fewest device-seconds per pair, of what fits."""
    nearest: Outcome | None
    """Where the setting asked for does not fit: the one that changes least."""


def longest_pair(planner: Planner, choice: Choice) -> int:
    """Tokens of prompt and answer up to which pairs, of the proportions of the data's longest, fit at this setting: a
    micro-batch of such pairs; 0 if none does.

    Memory is between a line and a parabola in the length: where the last three say that it is used up is tried, then
    beside it, until the ends of what is unknown are near enough to each other. None longer than `most_tokens` is.
    """
    if not planner.may_fit(choice):
        return 0
    run = planner.run
    record = longest_record(run.pairs)

    def spare(length: int) -> float:
        pairs = Pairs([stretched(record, length)], None, "", is_assumed=True)
        return planner.outcome(choice, pairs=pairs, exact_time=False).spare

    most = most_tokens(choice)
    low, high = STEP, min(most, max(2 * STEP, longest_length(run.pairs) // STEP * STEP))
    spare_low = spare(low)
    if spare_low < 0:
        return 0
    spare_high = spare(high)
    while spare_high >= 0:
        if high == most:
            return most
        per_token = max((spare_low - spare_high) / (high - low), 1.0)
        low, spare_low = high, spare_high
        # a little past the line's end; short pairs lie on a flat line, which says nothing
        ends = round(min(4 * high, 1.1 * (high + spare_high / per_token)) / STEP) * STEP
        high = min(most, max(high + STEP, ends))
        spare_high = spare(high)
    known = {low: spare_low, high: spare_high}
    for _ in range(ROUNDS):
        near = max(STEP, int(PRECISION * low) // STEP * STEP)
        if high - low <= near:
            break
        middle = int(_used_up(known, low, high)) // STEP * STEP
        # what lies beside an end that is known closes in on it from the other side
        middle = low + near if middle < low + near else high - near if middle > high - near else middle
        known[middle] = spare(middle)
        low, high = (middle, high) if known[middle] >= 0 else (low, middle)
    return low


def most_tokens(choice: Choice) -> int:
    """The longest pairs that are looked for."""
    return max(2 * STEP, MOST_TOKENS // choice.num_pairs // STEP * STEP)


def _used_up(known: dict[int, float], low: int, high: int) -> float:
    """The length between `low` and `high` where nothing is spared: on a parabola through what is known nearest to it,
    else on a line."""
    on_line = low + (high - low) * known[low] / (known[low] - known[high])
    nearest = sorted(known, key=lambda length: abs(length - on_line))[:3]
    if len(nearest) < 3 or not {low, high} <= set(nearest):
        return on_line
    roots = np.roots(np.polyfit(nearest, [known[length] for length in nearest], 2))
    within = [root.real for root in roots if abs(root.imag) < 1e-9 * abs(root) and low < root.real < high]
    return within[0] if within else on_line


def search(planner: Planner, asked: Outcome) -> Found:
    """Look for settings on the device that was given, on more of them where one setting after the other does not fit.

    What the run computes stays as asked, the number of pairs per optimizer step too; only where nothing else fits is a
    LoRA run's base put in 4 bits.
    """
    cheapest = None
    for stage in _stages(planner, asked.choice):
        fitting = [outcome for base in stage for outcome in _largest_batches(planner, base)]
        if fitting:
            cheapest = min(fitting, key=lambda outcome: outcome.device_seconds_per_pair)
            break
    nearest = None if asked.fits else _nearest(planner, asked.choice)
    return Found(cheapest and planner.outcome(cheapest.choice), nearest)


def _stages(planner: Planner, asked: Choice) -> Iterator[list[Choice]]:
    """Settings without a batch size, those of one stage of equal merit."""
    for bits, sharding, num_devices in _resources(planner, asked):
        base = replace(asked, layout="auto", bits=bits, sharding=sharding, num_devices=num_devices)
        kept, recomputed = replace(base, checkpointing=False, offloading=False), replace(base, checkpointing=True)
        yield [kept, recomputed]
        tiled = _tiled(planner, recomputed)
        yield from ([leaner] for leaner in dict.fromkeys((tiled, _offloaded(planner, tiled))) if leaner != recomputed)


def _tiled(planner: Planner, choice: Choice) -> Choice:
    """The same with MLPs in tiles, where they can be: no product more with checkpointing."""
    if choice.tiled_mlp is not None or choice.sharding == "zero3" or not planner.can_tile:
        return choice
    return replace(choice, tiled_mlp="auto")


def _offloaded(planner: Planner, choice: Choice) -> Choice:
    """The same with what checkpointing keeps in the host's memory, where that is another."""
    return replace(choice, offloading=planner.run.device.is_gpu)


def _resources(planner: Planner, asked: Choice):
    """Bits, sharding and number of devices, from what costs nothing to what costs most."""
    may_quantise = planner.run.model.lora is not None and asked.bits is None and planner.run.device.is_gpu
    num_devices = asked.num_devices
    while num_devices <= max(MOST_DEVICES, asked.num_devices):
        for bits in (asked.bits, 4) if may_quantise else (asked.bits,):
            for sharding in _shardings(asked, num_devices):
                yield bits, sharding, num_devices
        if not planner.run.device.is_gpu:
            return
        num_devices *= 2


def _shardings(asked: Choice, num_devices: int):
    if num_devices == 1:
        return ("none",)
    if asked.sharding in ("zero2", "zero3"):
        return (asked.sharding,)
    return ("ddp", "fsdp2")


def _largest_batches(planner: Planner, base: Choice, *, most: int = MOST_PAIRS) -> list[Outcome]:
    """The largest micro-batch that fits with `RESERVE` to spare, keeping the pairs of an optimizer step.

    One pair that fits is returned whatever it leaves, as nothing is smaller; none where it does not.
    """
    if not planner.may_fit(base):
        return []
    per_batch = max(1, base.global_pairs // base.num_batches)
    if planner.run.budget is not None:
        outcome = planner.outcome(base, exact_time=False)
        return [outcome] if outcome.fits else []

    def outcome_of(num_pairs: int) -> Outcome:
        choice = replace(base, num_pairs=num_pairs, accumulation=max(1, per_batch // num_pairs))
        return planner.outcome(choice, exact_time=False)

    sizes = [n for n in (1, 2, 4, 8, 16, 32, MOST_PAIRS) if n <= min(most, per_batch) and per_batch % n == 0]
    first = outcome_of(1)
    if not first.fits:
        return []
    if len(sizes) == 1:
        return [first]
    reserve = RESERVE * planner.run.device.memory_bytes
    # memory is a line in the number of pairs; the setting that was asked for is one that has been worked out
    other = base.num_pairs if base.num_pairs in sizes[1:] else sizes[1]
    per_pair = max(1.0, (first.spare - outcome_of(other).spare) / (other - 1))
    for num_pairs in reversed(sizes[1:]):
        if num_pairs == 2 or first.spare - reserve >= (num_pairs - 1) * per_pair * 0.95:
            outcome = outcome_of(num_pairs)
            if outcome.spare >= reserve:
                return [outcome]
    return [first]


def _nearest(planner: Planner, asked: Choice) -> Outcome | None:
    """One change after the other, each kept, until the run fits."""
    best = planner.best_layout if asked.layout != "auto" else "auto"
    changes = [replace(asked, checkpointing=True), replace(asked, checkpointing=True, layout=best)]
    changes.append(_tiled(planner, changes[-1]))
    leanest = changes[-1]
    per_device = asked.num_pairs * asked.accumulation
    num_pairs = asked.num_pairs
    while num_pairs % 2 == 0 and planner.run.budget is None:
        num_pairs //= 2
        changes.append(replace(changes[-1], num_pairs=num_pairs, accumulation=per_device // num_pairs))
    if num_pairs > 1 and planner.run.budget is None:
        changes.append(replace(changes[-1], num_pairs=1, accumulation=per_device))
    changes.append(_offloaded(planner, changes[-1]))
    tried: set[Choice] = {asked}
    for choice in changes:
        if choice not in tried and planner.may_fit(choice):
            tried.add(choice)
            if planner.outcome(choice, exact_time=False).fits:
                return planner.outcome(choice)
    for bits, sharding, num_devices in _resources(planner, asked):
        accumulation = max(1, asked.accumulation * asked.num_devices // num_devices)
        base = replace(leanest, bits=bits, sharding=sharding, num_devices=num_devices, accumulation=accumulation)
        for outcome in _largest_batches(planner, base, most=asked.num_pairs):
            return planner.outcome(outcome.choice)
    return None
