"""From preference pairs on disk to batches of tensors: load, check, tokenise, collate."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpop_trainer.data.budget import Budget, BudgetBatchSampler, pair_units, plan_batches
    from dpop_trainer.data.collate import PairCollator
    from dpop_trainer.data.convert import check_pairs
    from dpop_trainer.data.counts import TokeniseCounts
    from dpop_trainer.data.layouts import Layout, flat_row, packed_rows, padded_rows, tree_rows, trie_mask
    from dpop_trainer.data.lengths import with_lengths
    from dpop_trainer.data.load import load_pairs
    from dpop_trainer.data.pair_tree import PairTree
    from dpop_trainer.data.read import read_pairs
    from dpop_trainer.data.skipped import SkippedRecords
    from dpop_trainer.data.stream import SourceStream, TokenisedStream
    from dpop_trainer.data.tokenise import tokenise_pairs

__all__ = [
    "Budget",
    "BudgetBatchSampler",
    "Layout",
    "PairCollator",
    "PairTree",
    "SkippedRecords",
    "SourceStream",
    "TokeniseCounts",
    "TokenisedStream",
    "check_pairs",
    "flat_row",
    "load_pairs",
    "packed_rows",
    "padded_rows",
    "pair_units",
    "plan_batches",
    "read_pairs",
    "tokenise_pairs",
    "tree_rows",
    "trie_mask",
    "with_lengths",
]

_MODULES = {
    "Budget": "budget",
    "BudgetBatchSampler": "budget",
    "Layout": "layouts",
    "PairCollator": "collate",
    "PairTree": "pair_tree",
    "SkippedRecords": "skipped",
    "SourceStream": "stream",
    "TokeniseCounts": "counts",
    "TokenisedStream": "stream",
    "check_pairs": "convert",
    "flat_row": "layouts",
    "load_pairs": "load",
    "packed_rows": "layouts",
    "padded_rows": "layouts",
    "pair_units": "budget",
    "plan_batches": "budget",
    "read_pairs": "read",
    "tokenise_pairs": "tokenise",
    "tree_rows": "layouts",
    "trie_mask": "layouts",
    "with_lengths": "lengths",
}


def __getattr__(name: str) -> Any:
    # imported when asked for: reading pairs, and looking at them, needs no torch, as batches do
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
