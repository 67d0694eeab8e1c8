"""Batches by a budget of positions instead of a number of pairs: even steps, and memory that is known beforehand.

One plan per epoch, from the seed and the epoch alone: pairs are shuffled, taken in windows of many batches and dealt
out to the batches of their window by length; then a window's batches are shuffled. So a pair's place in the epoch is
random up to a window, and which pairs meet in a batch depends on their lengths only within it. Every epoch has the same
number of batches, a multiple of the number of processes, and holds every pair once.
"""

import bisect
import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch.utils.data import Sampler

from dpop_trainer.batches.layouts import group_length, longest_sequence, tree_length
from dpop_trainer.batches.lengths import read_trees
from dpop_trainer.data.pair_tree import PairTree

if TYPE_CHECKING:
    from datasets import Dataset

WINDOW_BATCHES = 32
"""Batches per window. Dealing out leaves the last of a window half full; 32 make that under 2 % of all positions."""


class Unit(NamedTuple):
    """Pairs that stay together: one, or several of the same prompt."""

    pairs: list[int]
    """Their rows in the data set."""
    length: int
    """Columns that they take up in a row of the layout."""


class Budget(NamedTuple):
    """How many positions a batch may have, padding included, and how they are counted."""

    max_positions: int
    layout: Literal["rows", "tree", "packed", "flat"]
    pad_to_multiple_of: int | None = None

    def positions(self, num_units: int, longest: int, total: int) -> int:
        """Positions of a batch of units, at most: packed rows have those of one row per unit, or fewer.

        Args:
            num_units: how many.
            longest: columns of the longest.
            total: columns of all.
        """
        multiple = self.pad_to_multiple_of or 1
        length = -(-(total if self.layout == "flat" else longest) // multiple) * multiple
        return length * {"flat": 1, "rows": 2 * num_units}.get(self.layout, num_units)

    def alone(self, unit: Unit) -> int:
        """Positions of a batch of one unit."""
        return self.positions(1, unit.length, unit.length)


def plan_batches(
    dataset: "Dataset",
    budget: Budget,
    *,
    prefix_sharing: bool,
    group_by_prompt: bool,
    seed: int,
    num_processes: int,
    num_epochs: int | None,
    num_batches: int = 0,
) -> "BudgetBatchSampler":
    """The batches of a tokenised data set.

    Args:
        dataset: from `tokenise_pairs`.
        budget: of each batch.
        prefix_sharing: as the collator's.
        group_by_prompt: see `pair_units`.
        seed, num_processes: see `BudgetBatchSampler`.
        num_epochs: how many there are to be; None for as many as it takes to `num_batches`.
        num_batches: in all epochs together, where num_epochs is None.

    Raises:
        ValueError: a pair alone exceeds the budget; says which and by how much.
    """
    trees = list(read_trees(dataset, prefix_sharing=prefix_sharing, desc="Planning batches"))
    units = pair_units(trees, budget, group_by_prompt=group_by_prompt)
    _check_units(units, budget, dataset["pair_id"])
    if num_epochs is None:
        first = BudgetBatchSampler(units, budget, seed=seed, num_epochs=1, num_processes=num_processes)
        num_epochs = 1 + num_batches // len(first)  # the last one in part, if not by the end of the one before
    return BudgetBatchSampler(units, budget, seed=seed, num_epochs=num_epochs, num_processes=num_processes)


def pair_units(trees: Sequence[PairTree], budget: Budget, *, group_by_prompt: bool = False) -> list[Unit]:
    """One unit per pair, or one per prompt where its pairs together keep to the budget.

    Args:
        trees: all pairs of the data set.
        budget: of a batch.
        group_by_prompt: keep pairs of the same prompt together, as many as the budget lets.
    """
    if not group_by_prompt:
        length = longest_sequence if budget.layout == "rows" else tree_length
        return [Unit([pair], length(tree)) for pair, tree in enumerate(trees)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for pair, tree in enumerate(trees):
        groups.setdefault(tuple(tree.prompt_ids), []).append(pair)
    return [unit for pairs in groups.values() for unit in _units_of_one_prompt(trees, pairs, budget)]


def _check_units(units: Sequence[Unit], budget: Budget, pair_ids: Sequence[int]) -> None:
    too_large = [unit for unit in units if budget.alone(unit) > budget.max_positions]
    if too_large:
        largest = max(too_large, key=budget.alone)
        raise ValueError(
            f"max_tokens_per_batch: expected at least {budget.alone(largest)}, the positions of pair "
            f"{pair_ids[largest.pairs[0]]} alone in layout {budget.layout!r}, got {budget.max_positions}, which "
            f"{len(too_large)} of {len(pair_ids)} pairs exceed. Raise it, or lower max_length."
        )


def _units_of_one_prompt(trees: Sequence[PairTree], pairs: list[int], budget: Budget) -> list[Unit]:
    unit = Unit(pairs, group_length([trees[pair] for pair in pairs]))
    if budget.alone(unit) <= budget.max_positions or len(pairs) == 1:
        return [unit]
    half = len(pairs) // 2
    return [part for side in (pairs[:half], pairs[half:]) for part in _units_of_one_prompt(trees, side, budget)]


class BudgetBatchSampler(Sampler[list[int]]):
    """Batches of data set rows within a budget of positions; a plan per epoch, see above.

    Args:
        units: from `pair_units`, none beyond the budget.
        budget: of each batch.
        seed: of all plans.
        num_epochs: for how many epochs the number of batches is to hold.
        num_processes: the number of batches is a multiple of this.
    """

    def __init__(self, units: Sequence[Unit], budget: Budget, *, seed: int, num_epochs: int, num_processes: int = 1):
        self.units, self.budget, self.seed = units, budget, seed
        assert all(budget.alone(unit) <= budget.max_positions for unit in units)
        self._epoch = 0
        longest = max((len(self._planned(epoch)) for epoch in range(num_epochs)), default=0)
        self._num_batches = min(math.ceil(longest / num_processes) * num_processes, self.num_pairs)

    @property
    def num_pairs(self) -> int:
        """Pairs in an epoch: all of the data set's."""
        return sum(len(unit.pairs) for unit in self.units)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's plan to give from the next iteration on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    @property
    def mean_positions(self) -> float:
        """Positions per batch, padding included, on average over an epoch."""
        positions = (
            self.budget.positions(len(batch), max(u.length for u in batch), sum(u.length for u in batch))
            for batch in self._planned(self._epoch)
        )
        return sum(positions) / max(1, self._num_batches)

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[pair for unit in batch for pair in unit.pairs] for batch in self._planned(self._epoch)]
        assert len(batches) <= self._num_batches, "more epochs than the number of batches was made for"
        while len(batches) < self._num_batches:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches.pop(largest)
            batches[largest:largest] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return iter(batches)

    def _planned(self, epoch: int) -> list[list[Unit]]:
        """An epoch's batches, before some of them are split for the sake of their number."""
        generator = random.Random(f"{self.seed} {epoch}")
        order = list(self.units)
        generator.shuffle(order)
        deal_out = _fill_up if self.budget.layout == "flat" else _cut_sorted
        average = sum(map(self.budget.alone, order)) / max(1, len(order))
        per_window = max(1, round(WINDOW_BATCHES * self.budget.max_positions / average)) if order else 1
        batches: list[list[Unit]] = []
        for start in range(0, len(order), per_window):
            window = deal_out(order[start : start + per_window], self.budget)
            generator.shuffle(window)
            batches += window
        return batches


def _fill_up(units: list[Unit], budget: Budget) -> list[list[Unit]]:
    """Longest first, each into the fullest batch that still has room for it."""
    multiple = budget.pad_to_multiple_of or 1
    capacity = budget.max_positions // multiple * multiple
    room: list[tuple[int, int]] = []  # sorted: room left, batch
    batches: list[list[Unit]] = []
    for unit in sorted(units, key=lambda unit: -unit.length):
        place = bisect.bisect_left(room, (unit.length, -1))
        if place == len(room):
            left, batch = capacity, len(batches)
            batches.append([])
        else:
            left, batch = room.pop(place)
        batches[batch].append(unit)
        bisect.insort(room, (left - unit.length, batch))
    return batches


def _cut_sorted(units: list[Unit], budget: Budget) -> list[list[Unit]]:
    """Neighbours by length together, for rows are padded to the longest."""
    batches: list[list[Unit]] = []
    total = 0
    for unit in sorted(units, key=lambda unit: -unit.length):
        batch = batches[-1] if batches else []
        longest = batch[0].length if batch else unit.length
        if batch and budget.positions(len(batch) + 1, longest, total + unit.length) <= budget.max_positions:
            batch.append(unit)
            total += unit.length
        else:
            batches.append([unit])
            total = unit.length
    return batches
