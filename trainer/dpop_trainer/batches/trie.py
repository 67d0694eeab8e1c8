"""Several sequences in one row, in which whatever they begin with alike stands once.

The tokens form a trie, and stand in the order in which a depth-first walk meets them: a token before all that follow
from it, those next to each other. So one number per column, where what follows from it ends, says who sees whom:

    query sees key   <=>   key <= query < ends[key]

That holds for a plain causal row, for a pair's tree, for many trees side by side and for any trie.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dpop_trainer.data.edits import common_prefix_length


class TrieRow(NamedTuple):
    """One row of T columns that holds S sequences."""

    input_ids: list[int]
    """T token ids."""
    position_ids: list[int]
    """T positions: how many tokens of its own sequence come before each."""
    ends: list[int]
    """For each column the first one after it that does not follow from it: no query from there on sees it."""
    columns: list[list[int]]
    """For each sequence the columns of its tokens, in order."""


def trie_row(sequences: Sequence[list[int]], num_common: Sequence[int]) -> TrieRow:
    """Lay sequences out one after the other, each without the tokens that it has in common with the one before.

    Args:
        sequences: S sequences of token ids, those that begin alike next to each other (sorted, for instance).
        num_common: for each sequence how many of its first tokens are those of the sequence before it; 0 for the first.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    ends: list[int] = []
    columns: list[list[int]] = []
    path: list[int] = []
    for sequence, common in zip(sequences, num_common, strict=True):
        _close(path[common:], ends, len(input_ids))
        path = [*path[:common], *range(len(input_ids), len(input_ids) + len(sequence) - common)]
        input_ids += sequence[common:]
        position_ids += range(common, len(sequence))
        ends += [0] * (len(sequence) - common)
        columns.append(path)
    _close(path, ends, len(input_ids))
    return TrieRow(input_ids, position_ids, ends, columns)


def sorted_trie_row(sequences: Sequence[list[int]]) -> TrieRow:
    """The row of the whole trie: every token that follows from the same beginning once. Columns are in the order of the
    sequences given, whatever the order in which they stand."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[i] for i in order]
    num_common = [0 if i == 0 else common_prefix_length(ordered[i - 1], sequence) for i, sequence in enumerate(ordered)]
    row = trie_row(ordered, num_common)
    columns: list[list[int]] = [[]] * len(sequences)
    for i, path in zip(order, row.columns, strict=True):
        columns[i] = path
    return row._replace(columns=columns)


def _close(path: list[int], ends: list[int], end: int) -> None:
    for column in path:
        ends[column] = end
