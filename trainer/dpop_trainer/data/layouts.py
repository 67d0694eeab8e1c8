"""How a batch of pairs is laid out as model input: one function per layout, from trees to tensors.

Whatever the layout, what is scored comes in the same order: shared tokens, chosen tail, rejected tail, pair by pair.
So `target_ids` and `cu_seqlens` do not depend on it, and `score_positions` says where the layout put each token's
predictor.
"""

import itertools
from typing import Literal

import torch
from torch import Tensor

from dpop_trainer.data.pair_tree import PairTree

Layout = Literal["rows", "tree", "auto"]
"""Two rows per pair, one row per pair, or for each batch the cheaper of the two."""


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


def padded_rows(
    trees: list[PairTree], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
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
    return {
        "input_ids": _padded(rows, length, pad_token_id),
        "attention_mask": _padded([[1] * len(ids) for ids in rows], length, 0),
        "score_positions": torch.tensor(score_positions, dtype=torch.int64),
        "token_counts": token_counts(trees, rows),
        **scored_tokens(trees),
    }


def tree_rows(trees: list[PairTree], *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
    """One right-padded row per pair, [prompt + shared | chosen tail | rejected tail]: every token once.

    The rejected tail's positions count on from the branch, and `tree_mask` hides the chosen tail from it, so it sees
    what it would see in a row of its own. Both tails' first tokens are predicted by the position before the branch.

    Args:
        trees: B pairs, each with at least one prompt token.
        pad_token_id: what fills a row up. No token sees it, and it is never scored.
        pad_to_multiple_of: round the length T up to a multiple of this.

    Returns:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 for tokens and 0 for padding: not enough for the model, which takes `tree_mask`.
        position_ids: [B, T] int64; 0 for padding.
        branches: [B, 2] int64, the columns at which the chosen and the rejected tail begin: for `tree_mask`.
        score_positions: [N] int64, as in `padded_rows`, into hidden states [B, T, H] flattened to [B * T, H].
        token_counts: see `token_counts`.
        target_ids, cu_seqlens: see `scored_tokens`.
    """
    rows = [tree.prompt_ids + tree.shared_ids + tree.chosen_ids + tree.rejected_ids for tree in trees]
    length = _padded_length(rows, pad_to_multiple_of)

    position_rows: list[list[int]] = []
    branches: list[list[int]] = []
    score_positions: list[int] = []
    for pair, tree in enumerate(trees):
        branch = len(tree.prompt_ids) + len(tree.shared_ids)
        rejected = branch + len(tree.chosen_ids)
        position_rows.append([*range(rejected), *range(branch, branch + len(tree.rejected_ids))])
        branches.append([branch, rejected])
        start = pair * length
        score_positions += range(start + len(tree.prompt_ids) - 1, start + rejected - 1)
        if tree.rejected_ids:
            score_positions.append(start + branch - 1)
            score_positions += range(start + rejected, start + rejected + len(tree.rejected_ids) - 1)
    return {
        "input_ids": _padded(rows, length, pad_token_id),
        "attention_mask": _padded([[1] * len(ids) for ids in rows], length, 0),
        "position_ids": _padded(position_rows, length, 0),
        "branches": torch.tensor(branches, dtype=torch.int64).view(-1, 2),
        "score_positions": torch.tensor(score_positions, dtype=torch.int64),
        "token_counts": token_counts(trees, rows),
        **scored_tokens(trees),
    }


def tree_mask(branches: Tensor, length: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Which positions of a tree row see which, as the attention of transformers' models takes it.

    A position sees itself and all before it; from the rejected tail on, except the chosen tail. Padding sees too (a row
    of the softmax with nothing in it would be NaN) and is seen by no token, since it comes last.

    Args:
        branches: [B, 2] int64, from `tree_rows`.
        length: T, the padded length of the rows.
        dtype: torch.bool for sdpa: True where seen. A floating dtype for eager, which adds the mask to its scores:
            0 where seen, elsewhere the dtype's lowest number.

    Returns:
        [B, 1, T, T], queries by keys, on the device of `branches`; no sync.
    """
    columns = torch.arange(length, device=branches.device)
    chosen, rejected = branches[:, 0].view(-1, 1, 1), branches[:, 1].view(-1, 1, 1)
    query, key = columns.view(1, -1, 1), columns.view(1, 1, -1)
    seen = (key <= query) & ~((query >= rejected) & (key >= chosen) & (key < rejected))
    seen = seen.unsqueeze(1)
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def cheaper_layout(
    trees: list[PairTree], *, hidden_size: int | None = None, pad_to_multiple_of: int | None = None
) -> Literal["rows", "tree"]:
    """The layout that computes a batch with less work; "tree" where both cost the same.

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
    tree_length = max((sum(map(len, tree)) for tree in trees), default=0)
    rows_length = max((_beginning(tree) + max(map(len, tree[2:])) for tree in trees), default=0)

    def cost(length: int) -> float:
        length = _round_up(length, pad_to_multiple_of)
        return length + (length**2 / (6 * hidden_size) if hidden_size else 0.0)

    return "tree" if cost(tree_length) <= 2 * cost(rows_length) else "rows"


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


def _padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    padded = torch.full((len(rows), length), fill, dtype=torch.int64)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
    return padded
