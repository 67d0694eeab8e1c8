"""Where the chosen and the rejected answer of a pair differ, in tokens.

chosen     [a b c X d e]        prefix 3, suffix 2
rejected   [a b c Y d e]        before = [0, 3)   at = [3, 4)   after = [4, 6)
"""

from collections.abc import Sequence
from typing import NamedTuple


class EditRegions(NamedTuple):
    """The two bounds that split the chosen answer into before [0, start), at [start, end) and after [end, length)."""

    start: int
    """Number of tokens before the edit: both answers begin with them."""
    end: int
    """One past the last token of the edit; equal to `start` when the rejected answer only inserts tokens."""


def common_prefix_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items both sequences begin with."""
    length = 0
    for item_a, item_b in zip(a, b, strict=False):
        if item_a != item_b:
            break
        length += 1
    return length


def common_suffix_length(a: Sequence[object], b: Sequence[object], prefix: int = 0) -> int:
    """How many items both sequences end with, not counting the first `prefix` items of either."""
    longest = min(len(a), len(b)) - prefix
    length = 0
    while length < longest and a[-1 - length] == b[-1 - length]:
        length += 1
    return length


def first_difference(chosen_ids: Sequence[object], rejected_ids: Sequence[object]) -> int:
    """Index of the first token in which the answers differ; the shorter length when one answer begins the other.

    Raises:
        ValueError: the answers are equal.
    """
    prefix = common_prefix_length(chosen_ids, rejected_ids)
    if prefix == len(chosen_ids) == len(rejected_ids):
        raise ValueError(
            f"rejected_ids: expected an answer other than chosen_ids, got the same {prefix} tokens. "
            "Drop the pair, or truncate it less."
        )
    return prefix


def edit_regions(chosen_ids: Sequence[object], rejected_ids: Sequence[object]) -> EditRegions:
    """The smallest single stretch of the chosen answer that must change to give the rejected one.

    Where the prefix and the suffix could both claim a token ("7 7" against "7 7 7"), the prefix has it.

    Raises:
        ValueError: the answers are equal.
    """
    start = first_difference(chosen_ids, rejected_ids)
    return EditRegions(start, len(chosen_ids) - common_suffix_length(chosen_ids, rejected_ids, start))
