"""How a batch of pairs is laid out as model input: one function per layout, from trees to tensors.

Whatever the layout, what is scored comes in the same order: shared tokens, chosen tail, rejected tail, pair by pair.
So `target_ids` and `cu_seqlens` do not depend on it, and `score_positions` says where the layout put each token's
predictor.
"""

import itertools

import torch
from torch import Tensor

from dpop_trainer.data.pair_tree import PairTree


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
        target_ids, cu_seqlens: see `scored_tokens`.
    """
    chosen_rows = [tree.prompt_ids + tree.shared_ids + tree.chosen_ids for tree in trees]
    rejected_rows = [tree.prompt_ids + tree.shared_ids + tree.rejected_ids for tree in trees]
    rows = chosen_rows + rejected_rows
    multiple = pad_to_multiple_of or 1
    length = -(-max(map(len, rows), default=0) // multiple) * multiple
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1

    score_positions: list[int] = []
    for pair, tree in enumerate(trees):
        # a token is predicted one position before its own
        shared = len(tree.prompt_ids) - 1
        tail = shared + len(tree.shared_ids)
        chosen_start, rejected_start = pair * length, (len(trees) + pair) * length
        score_positions += range(chosen_start + shared, chosen_start + tail + len(tree.chosen_ids))
        score_positions += range(rejected_start + tail, rejected_start + tail + len(tree.rejected_ids))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "score_positions": torch.tensor(score_positions, dtype=torch.int64),
        **scored_tokens(trees),
    }
