"""How a batch of pairs is laid out as model input: one function per layout, from trees to tensors.

Whatever the layout, what is scored comes in the same order: shared tokens, chosen tail, rejected tail, pair by pair.
So `target_ids` and `cu_seqlens` do not depend on it, and `score_positions` says where the layout put each token's
predictor.
"""

import heapq
import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dpop_trainer.batches.batch import Batch
from dpop_trainer.batches.trie import TrieRow, sorted_trie_row, trie_row
from dpop_trainer.data.pair_tree import PairTree

Layout = Literal["rows", "tree", "packed", "flat", "auto"]
"""Two rows per pair, one row per pair, rows of several pairs, all pairs in one row, or for each batch the cheapest of
rows, tree and packed."""


def scored_tokens(trees: list[PairTree]) -> dict[str, Tensor]:
    """The tokens to score and their segments, the same for every layout.

    Returns:
        target_ids: [N] int64, the scored tokens.
        cu_seqlens: [3B + 1] int32, where each segment begins and ends among them; segments may be empty.
    """
    segments = [ids for tree in trees for ids in (tree.shared_ids, tree.chosen_ids, tree.rejected_ids)]
    bounds = itertools.accumulate((len(ids) for ids in segments), initial=0)
    return {
        "target_ids": torch.tensor([token_id for ids in segments for token_id in ids], dtype=torch.int64),
        "cu_seqlens": torch.tensor(list(bounds), dtype=torch.int32),
    }


def padded_rows(trees: list[PairTree], *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> Batch:
    """Two right-padded rows per pair, prompt + answer each: any model can run it.

    Both rows of a pair hold the shared tokens; they are scored in the chosen row. Each tail is scored in its own row,
    its first token from the last position before it.

    Args:
        trees: B pairs, each with at least one prompt token.
        pad_token_id: what fills a row up; it is masked and never scored.
        pad_to_multiple_of: round the length T up to a multiple of this.

    Returns:
        input_ids: [2B, T] int64, chosen answers in rows 0..B-1, rejected in rows B..2B-1.
        attention_mask: [2B, T] int64, 1 for tokens and 0 for padding.
        score_positions: [N] int64, for each scored token the position that predicts it, as an index into the model's
            hidden states [2B, T, H] flattened to [2B * T, H].
        token_counts: see `token_counts`.
        target_ids, cu_seqlens: see `scored_tokens`.
    """
    chosen_rows = [tree.prompt_ids + tree.shared_ids + tree.chosen_ids for tree in trees]
    rejected_rows = [tree.prompt_ids + tree.shared_ids + tree.rejected_ids for tree in trees]
    rows = chosen_rows + rejected_rows
    length = _padded_length(rows, pad_to_multiple_of)

    score_positions: list[int] = []
    for pair, tree in enumerate(trees):
        # a token is predicted one position before its own
        shared = len(tree.prompt_ids) - 1
        tail = shared + len(tree.shared_ids)
        chosen_start, rejected_start = pair * length, (len(trees) + pair) * length
        score_positions += range(chosen_start + shared, chosen_start + tail + len(tree.chosen_ids))
        score_positions += range(rejected_start + tail, rejected_start + tail + len(tree.rejected_ids))
    return Batch(
        input_ids=_padded(rows, length, pad_token_id),
        attention_mask=_padded([[1] * len(ids) for ids in rows], length, 0),
        score_positions=torch.tensor(score_positions, dtype=torch.int64),
        token_counts=token_counts(trees, rows),
        **scored_tokens(trees),
    )


def tree_rows(trees: list[PairTree], *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> Batch:
    """One right-padded row per pair, [prompt + shared | chosen tail | rejected tail]: every token once.

    The rejected tail's positions count on from the branch, and the chosen tail is hidden from it, so it sees what it
    would see in a row of its own. Both tails' first tokens are predicted by the position before the branch.

    Args:
        trees: B pairs, each with at least one prompt token.
        pad_token_id: what fills a row up. No token sees it, and it is never scored.
        pad_to_multiple_of: round the length T up to a multiple of this.

    Returns:
        input_ids: [R, T] int64, here with a row for each pair: R = B.
        attention_mask: [R, T] int64, 1 for tokens and 0 for padding: not enough for the model, see `trie_ends`.
        position_ids: [R, T] int64; 0 for padding.
        trie_ends: [R, T] int64: the first column after each from which on it is not seen, for `trie_mask`. T for
            padding.
        num_sequences: [R, T] int64: how many of the pairs' sequences go through each position; 0 for padding.
        score_positions: [N] int64, as in `padded_rows`, into hidden states [R, T, H] flattened to [R * T, H].
        token_counts: see `token_counts`.
        target_ids, cu_seqlens: see `scored_tokens`.
    """
    rows = [trie_row(_sequences(tree), [0, _beginning(tree)]) for tree in trees]
    places = [(row, trie.columns[0], trie.columns[1]) for row, trie in enumerate(rows)]
    return _trie_rows(trees, rows, places, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)


def packed_rows(
    trees: list[PairTree],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    hidden_size: int | None = None,
) -> Batch:
    """Several pairs in each row, as many rows as make the batch cheapest; less padding than one row per pair.

    A row holds the trie of its pairs' sequences: whatever several of them begin with, prompt and answer tokens alike,
    stands in it once. Pairs of the same prompt share a row.

    Args:
        trees, pad_token_id, pad_to_multiple_of: as for `tree_rows`.
        hidden_size: H of the model, to weigh the longer rows' attention; None counts positions only, and puts all
            pairs into one row.

    Returns:
        The tensors of `tree_rows`.
    """
    bins = pack_pairs(trees, hidden_size=hidden_size, pad_to_multiple_of=pad_to_multiple_of).bins
    return _binned_rows(trees, bins, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)


def flat_row(trees: list[PairTree], *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> Batch:
    """All pairs in a single row, for an attention that leaves out what is not seen (`flat_attention`): no padding but
    up to the multiple, and every token of the batch's trie once.

    Args:
        trees, pad_token_id, pad_to_multiple_of: as for `tree_rows`.

    Returns:
        The tensors of `tree_rows`, with R = 1.
    """
    bins = [list(range(len(trees)))]
    return _binned_rows(trees, bins, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)


def trie_mask(trie_ends: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """Which positions of a row see which, as the attention of transformers' models takes it.

    A position sees itself and all before it from which it follows. Padding is seen by padding alone (a row of the
    softmax with nothing in it would be NaN).

    Args:
        trie_ends: [R, T] int64, from `tree_rows` or `packed_rows`.
        dtype: torch.bool for sdpa: True where seen. A floating dtype for eager, which adds the mask to its scores:
            0 where seen, elsewhere the dtype's lowest number.

    Returns:
        [R, 1, T, T], queries by keys, on the device of `trie_ends`; no sync.
    """
    columns = torch.arange(trie_ends.shape[1], device=trie_ends.device)
    query, key = columns.view(1, -1, 1), columns.view(1, 1, -1)
    seen = (key <= query) & (query < trie_ends.unsqueeze(1))
    seen = seen.unsqueeze(1)
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def cheaper_layout(
    trees: list[PairTree], *, hidden_size: int | None = None, pad_to_multiple_of: int | None = None
) -> Literal["rows", "tree", "packed"]:
    """The layout that computes a batch with the least work where attention takes a 4-D mask; of equals the tree.

    One row of T positions costs T + T² / 6H, in units of what a position costs outside of attention. A transformer
    layer has about 12 H² weights, 2 · 12 H² FLOP per position, and its attention under a mask 4 H T² per row. So
    a pair alone with a common beginning of m tokens and tails of t each is cheaper as a tree where 6 H m + m² ≥ 2 t²:
    always, but for long tails after a short prompt.

    Sharing more of a pair never makes its tree longer, so that the answers' common beginning is always worth sharing.

    Args:
        trees: B pairs.
        hidden_size: H of the model; None leaves attention out and counts positions.
        pad_to_multiple_of: what lengths are rounded up to.
    """
    if not trees:
        return "tree"

    def cost(num_rows: int, length: int) -> float:
        return rows_cost(num_rows, length, hidden_size=hidden_size, pad_to_multiple_of=pad_to_multiple_of)

    costs: dict[Literal["rows", "tree", "packed"], float] = {
        "tree": cost(len(trees), max(map(tree_length, trees))),
        "packed": pack_pairs(trees, hidden_size=hidden_size, pad_to_multiple_of=pad_to_multiple_of).cost,
        "rows": cost(2 * len(trees), max(map(longest_sequence, trees))),
    }
    return min(costs, key=costs.__getitem__)  # of equals the first


class Packing(NamedTuple):
    """Which pairs share a row."""

    bins: list[list[int]]
    """For each row the indices of its pairs."""
    cost: float
    """Of all rows, see `rows_cost`."""


def pack_pairs(
    trees: list[PairTree], *, hidden_size: int | None = None, pad_to_multiple_of: int | None = None
) -> Packing:
    """Deal pairs out to rows, so that all rows together cost least.

    For each number of rows the longest pairs are dealt out first, each to the row that is shortest so far; the number
    whose rows, padded to the longest, cost least is taken. Pairs of the same prompt are dealt out together.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for pair, tree in enumerate(trees):
        groups.setdefault(tuple(tree.prompt_ids), []).append(pair)
    lengths = [group_length([trees[i] for i in group]) for group in groups.values()]
    longest_first = sorted(zip(lengths, groups.values(), strict=True), key=lambda item: -item[0])
    best = Packing([], math.inf if trees else 0.0)
    for num_rows in range(1, len(longest_first) + 1):
        rows = [(0, row) for row in range(num_rows)]  # a heap: length so far, row
        packed: list[list[int]] = [[] for _ in rows]
        for length, group in longest_first:
            filled, row = rows[0]
            packed[row] += group
            heapq.heapreplace(rows, (filled + length, row))
        cost = rows_cost(num_rows, max(rows)[0], hidden_size=hidden_size, pad_to_multiple_of=pad_to_multiple_of)
        if cost < best.cost:
            best = Packing(packed, cost)
    return best


def rows_cost(
    num_rows: int, length: int, *, hidden_size: int | None = None, pad_to_multiple_of: int | None = None
) -> float:
    """What rows of a length cost under a mask, in units of what one position costs outside of attention."""
    length = _round_up(length, pad_to_multiple_of)
    return num_rows * (length + (length**2 / (6 * hidden_size) if hidden_size else 0.0))


def tree_length(tree: PairTree) -> int:
    """Columns of a pair's own tree."""
    return sum(map(len, tree))


def longest_sequence(tree: PairTree) -> int:
    """Columns of the longer of a pair's two rows."""
    return _beginning(tree) + max(len(tree.chosen_ids), len(tree.rejected_ids))


def group_length(trees: list[PairTree]) -> int:
    """Columns of the trie of pairs with one prompt; for a single pair, of its tree."""
    if len(trees) == 1:
        return tree_length(trees[0])
    return len(sorted_trie_row([ids for tree in trees for ids in _sequences(tree)]).input_ids)


def token_counts(trees: list[PairTree], rows: list[list[int]]) -> Tensor:
    """Two counts [2] int64: tokens of both whole sequences of every pair (prompt and answer, twice), and tokens in the
    rows that the model runs. Neither counts padding."""
    logical = sum(2 * _beginning(tree) + len(tree.chosen_ids) + len(tree.rejected_ids) for tree in trees)
    return torch.tensor([logical, sum(map(len, rows))], dtype=torch.int64)


def _padded_length(rows: list[list[int]], multiple: int | None) -> int:
    """The longest row's length, rounded up to a multiple."""
    return _round_up(max(map(len, rows), default=0), multiple)


def _round_up(length: int, multiple: int | None) -> int:
    multiple = multiple or 1
    return -(-length // multiple) * multiple


def _beginning(tree: PairTree) -> int:
    """Tokens that both sequences of the pair begin with."""
    return len(tree.prompt_ids) + len(tree.shared_ids)


def _sequences(tree: PairTree) -> list[list[int]]:
    """The two whole sequences, chosen first."""
    beginning = tree.prompt_ids + tree.shared_ids
    return [beginning + tree.chosen_ids, beginning + tree.rejected_ids]


def _binned_rows(
    trees: list[PairTree], bins: list[list[int]], *, pad_token_id: int, pad_to_multiple_of: int | None
) -> Batch:
    """The trie of each bin's pairs in a row."""
    rows = [sorted_trie_row([ids for pair in pairs for ids in _sequences(trees[pair])]) for pairs in bins]
    places: list[tuple[int, list[int], list[int]]] = [(0, [], [])] * len(trees)
    for row, pairs in enumerate(bins):
        for i, pair in enumerate(pairs):
            places[pair] = (row, rows[row].columns[2 * i], rows[row].columns[2 * i + 1])
    return _trie_rows(trees, rows, places, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)


def _trie_rows(
    trees: list[PairTree],
    rows: list[TrieRow],
    places: list[tuple[int, list[int], list[int]]],  # each pair's row, and the columns of its two sequences there
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None,
) -> Batch:
    length = _padded_length([row.input_ids for row in rows], pad_to_multiple_of)
    score_positions: list[int] = []
    for tree, (row, chosen, rejected) in zip(trees, places, strict=True):
        # a token is predicted by the one before it in its own sequence
        predictors = chosen[len(tree.prompt_ids) - 1 : -1] + rejected[_beginning(tree) - 1 : -1]
        score_positions += [row * length + column for column in predictors]
    return Batch(
        input_ids=_padded([row.input_ids for row in rows], length, pad_token_id),
        attention_mask=_padded([[1] * len(row.input_ids) for row in rows], length, 0),
        position_ids=_padded([row.position_ids for row in rows], length, 0),
        trie_ends=_padded([row.ends for row in rows], length, length),
        num_sequences=_padded([_num_sequences(row) for row in rows], length, 0),
        score_positions=torch.tensor(score_positions, dtype=torch.int64),
        token_counts=token_counts(trees, [row.input_ids for row in rows]),
        **scored_tokens(trees),
    )


def _num_sequences(row: TrieRow) -> list[int]:
    taken = torch.tensor([column for path in row.columns for column in path], dtype=torch.int64)
    return taken.bincount(minlength=len(row.input_ids)).tolist()


def _padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    padded = torch.full((len(rows), length), fill, dtype=torch.int64)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
    return padded
