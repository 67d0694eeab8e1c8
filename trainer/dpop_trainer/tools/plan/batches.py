"""The batches that a run would make: from its own data, or from lengths that stand for it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpop_trainer.batches import Batch, Budget, BudgetBatchSampler, PairCollator, pair_units
from dpop_trainer.batches.budget import Unit
from dpop_trainer.batches.layouts import longest_sequence, tree_length
from dpop_trainer.data.pair_tree import PairTree
from dpop_trainer.data.records import TOKEN_COLUMNS

Record = dict[str, Any]

NUM_SAMPLED = 24
"""Batches from which the typical one is taken."""
FIRST_ID = 3
"""Of the ids of synthetic pairs; which they are does not matter, whether two are equal does."""
NUM_SYNTHETIC = 256
APART = 10_000_000
"""Between the ids of a pair and of another like it; larger than any vocabulary."""


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs that stand for a run's."""

    records: Sequence[Record]
    """prompt_ids, chosen_ids, rejected_ids, pair_id."""
    num_pairs: int | None
    """In an epoch; None where nobody said."""
    origin: str
    """In words, for the report."""
    is_assumed: bool


@dataclass(frozen=True)
class BatchSetting:
    """How a run's batches are made."""

    layout: Literal["rows", "tree", "packed", "flat", "auto"]
    num_pairs: int
    """Per micro-batch and device, where there is no budget."""
    budget: int | None = None
    """max_tokens_per_batch."""
    group_by_prompt: bool = False
    prefix_sharing: bool = True
    pad_to_multiple_of: int | None = None
    hidden_size: int | None = None

    def collator(self) -> PairCollator:
        return PairCollator(
            pad_token_id=0,
            prefix_sharing=self.prefix_sharing,
            pad_to_multiple_of=self.pad_to_multiple_of,
            layout=self.layout,
            hidden_size=self.hidden_size,
        )


@dataclass(frozen=True)
class Batches:
    """What matters of an epoch's batches."""

    largest: Batch
    """The most positions that a batch can have: of the longest pairs together."""
    typical: Batch
    """One with about the mean number of positions."""
    scale: float
    """Mean positions over the typical batch's."""
    pairs_per_batch: float
    positions: float
    """Mean, padding included."""
    padding: float
    """Part of the positions."""
    scored: float
    """Mean."""


def make_batches(pairs: Pairs, setting: BatchSetting, *, seed: int = 0) -> Batches:
    """
    Raises:
        ValueError: a pair exceeds the budget of positions.
    """
    collate = setting.collator()
    records = pairs.records
    if setting.budget is None:
        longest = sorted(records, key=lambda record: -_length(record, setting))
        largest = _taken(longest, setting.num_pairs)
        generator = random.Random(seed)
        sampled = []
        for _ in range(NUM_SAMPLED if len(records) > 1 else 1):
            order = generator.sample(range(len(records)), min(setting.num_pairs, len(records)))
            sampled.append(_taken([records[i] for i in order], setting.num_pairs))
        pairs_per_batch = float(setting.num_pairs)
    else:
        chosen = _batches_of_budget(records, setting, seed)
        largest = max(chosen, key=lambda batch: collate(batch).input_ids.numel())
        pairs_per_batch = sum(map(len, chosen)) / len(chosen)
        sampled = chosen[: 2 * NUM_SAMPLED]
    batches = [collate(batch) for batch in sampled]
    mean = sum(batch.input_ids.numel() for batch in batches) / len(batches)
    typical = min(batches, key=lambda batch: abs(batch.input_ids.numel() - mean))
    tokens = sum(float(batch.token_counts[1]) for batch in batches) / len(batches)
    return Batches(
        largest=collate(largest),
        typical=typical,
        scale=mean / typical.input_ids.numel(),
        pairs_per_batch=pairs_per_batch,
        positions=mean,
        padding=1 - tokens / mean,
        scored=sum(batch.target_ids.shape[0] for batch in batches) / len(batches),
    )


def worst_case(max_length: int, *, num_pairs: int | None = None) -> Pairs:
    """Every pair as long as it may be: half prompt, half answers, which share nothing."""
    prompt = max_length // 2
    record = _record(0, prompt, 0, max_length - prompt, max_length - prompt)
    origin = f"every pair at max_length, {max_length} tokens, half of them answer, nothing shared"
    return Pairs([record], num_pairs, origin, is_assumed=True)


def of_statistics(
    prompt: Sequence[float],
    answer: Sequence[float],
    shared: Sequence[float] | None,
    *,
    max_length: int | None,
    num_pairs: int | None,
) -> Pairs:
    """Pairs whose lengths have the given mean, 95th percentile and maximum.

    Args:
        prompt, answer, shared: tokens: the mean, then where known the 95th percentile, then the maximum. Both answers
            begin with the shared ones.
        max_length: prompt and answer are cut to so many.
        num_pairs: in an epoch.

    Raises:
        ValueError: no such lengths.
    """
    generator = random.Random(0)
    columns = []
    for name, values in (("prompt_tokens", prompt), ("answer_tokens", answer), ("shared_tokens", shared or [0.0])):
        lengths = _lengths(name, values)
        generator.shuffle(lengths)
        columns.append(lengths)
    records = []
    for i, (num_prompt, num_answer, num_shared) in enumerate(zip(*columns, strict=True)):
        num_prompt = max(1, num_prompt)
        if max_length is not None:
            num_prompt = min(num_prompt, max_length - 1)
            num_answer = min(num_answer, max_length - num_prompt)
        num_shared = min(num_shared, max(0, num_answer - 1))
        tail = max(1, num_answer - num_shared)
        records.append(_record(i, num_prompt, num_shared, tail, tail))
    told = ", ".join(
        f"{name} {' / '.join(f'{value:g}' for value in values)}"
        for name, values in (("prompt", prompt), ("answer", answer), ("shared", shared or [0.0]))
    )
    return Pairs(records, num_pairs, f"lengths as given (mean / p95 / max): {told} tokens", is_assumed=True)


def stretched(record: Record, length: int) -> Record:
    """A pair of about the same proportions whose longer sequence has so many tokens."""
    tree = PairTree.from_ids(*(record[column] for column in TOKEN_COLUMNS), share_prefix=True)
    factor = length / longest_sequence(tree)
    parts = [round(factor * len(part)) for part in tree]
    num_prompt, num_shared, num_chosen, num_rejected = max(1, parts[0]), parts[1], parts[2], parts[3]
    excess = num_prompt + num_shared + max(num_chosen, num_rejected) - length
    num_prompt = max(1, num_prompt - excess)
    return _record(0, num_prompt, num_shared, num_chosen, num_rejected)


def longest_record(pairs: Pairs) -> Record:
    """The pair whose longer sequence is the longest."""
    return max(pairs.records, key=_longest)


def longest_length(pairs: Pairs) -> int:
    """Tokens of prompt and answer, of the longest."""
    return max(map(_longest, pairs.records))


def _taken(records: Sequence[Record], count: int) -> list[Record]:
    """So many of them; where there are fewer, others like them that have no token in common."""
    return [_like(records[i % len(records)], i // len(records)) for i in range(count)]


def _like(record: Record, copy: int) -> Record:
    if not copy:
        return record
    ids = {column: [token_id + copy * APART for token_id in record[column]] for column in TOKEN_COLUMNS}
    return {**record, **ids}


def _longest(record: Record) -> int:
    return len(record["prompt_ids"]) + max(len(record["chosen_ids"]), len(record["rejected_ids"]))


def _length(record: Record, setting: BatchSetting) -> int:
    tree = _tree(record, setting)
    return longest_sequence(tree) if setting.layout == "rows" else tree_length(tree)


def _tree(record: Record, setting: BatchSetting) -> PairTree:
    return PairTree.from_ids(*(record[column] for column in TOKEN_COLUMNS), share_prefix=setting.prefix_sharing)


def _batches_of_budget(records: Sequence[Record], setting: BatchSetting, seed: int) -> list[list[Record]]:
    assert setting.budget is not None
    layout: Any = "packed" if setting.layout == "auto" else setting.layout
    budget = Budget(setting.budget, layout, setting.pad_to_multiple_of)
    units = pair_units([_tree(r, setting) for r in records], budget, group_by_prompt=setting.group_by_prompt)
    needed = max(map(budget.alone, units))
    if needed > setting.budget:
        raise ValueError(
            f"max_tokens_per_batch: expected at least {needed}, the positions of the longest pair alone in layout "
            f"{layout!r}, got {setting.budget}. Raise it, or lower max_length."
        )
    copies = max(1, -(-4 * setting.budget // max(1, sum(unit.length for unit in units))))
    count = len(records)  # a few pairs stand for many like them
    units = [
        Unit([pair + copy * count for pair in unit.pairs], unit.length) for unit in units for copy in range(copies)
    ]
    batches = BudgetBatchSampler(units, budget, seed=seed, num_epochs=1)
    return [[_like(records[i % count], i // count) for i in batch] for batch in batches]


def _lengths(name: str, values: Sequence[float]) -> list[int]:
    """`NUM_SYNTHETIC` lengths, straight lines between quantiles, so that mean, 95th percentile and maximum are met."""
    if not 1 <= len(values) <= 3 or any(value < 0 for value in values) or list(values) != sorted(values):
        raise ValueError(
            f"{name}: expected the mean, then where known the 95th percentile and the maximum, rising, got "
            f"{' '.join(f'{value:g}' for value in values)}."
        )
    mean = values[0]
    if len(values) == 1:
        return [round(mean)] * NUM_SYNTHETIC
    p95 = values[1]
    top = values[2] if len(values) == 3 else p95
    # below the 95th percentile a power of the quantile: its mean is p95 / (k + 1)
    body = (mean - 0.05 * (p95 + top) / 2) / 0.95
    if not 0 < body <= p95:
        raise ValueError(
            f"{name}: expected a mean that the other two leave room for, got {' '.join(f'{v:g}' for v in values)}."
        )
    power = p95 / body - 1
    lengths = []
    for i in range(NUM_SYNTHETIC):
        quantile = (i + 0.5) / NUM_SYNTHETIC
        rest = (quantile - 0.95) / 0.05
        lengths.append(round(p95 * (quantile / 0.95) ** power if rest < 0 else p95 + rest * (top - p95)))
    lengths[-1] = round(top)
    return lengths


def _record(pair_id: int, num_prompt: int, num_shared: int, num_chosen: int, num_rejected: int) -> Record:
    """Each pair has a prompt of its own; the answers part where they are to."""
    prompt = [FIRST_ID + pair_id] * num_prompt
    shared = [FIRST_ID] * num_shared
    chosen, rejected = shared + [1] * num_chosen, shared + [2] * num_rejected
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "pair_id": pair_id}
