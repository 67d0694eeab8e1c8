"""Batches of pairs as tensors: laid out in rows, collated, filled up to a budget, dealt to ranks or spread over them.

Imports `data`, and for the choice of a layout `models`. A new layout is one function in `layouts.py`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpop_trainer.batches.batch import Batch
    from dpop_trainer.batches.budget import Budget, BudgetBatchSampler, pair_units, plan_batches
    from dpop_trainer.batches.collate import PairCollator
    from dpop_trainer.batches.layouts import Layout, flat_row, packed_rows, padded_rows, tree_rows, trie_mask
    from dpop_trainer.batches.lengths import with_lengths

__all__ = [
    "Batch",
    "Budget",
    "BudgetBatchSampler",
    "Layout",
    "PairCollator",
    "flat_row",
    "packed_rows",
    "padded_rows",
    "pair_units",
    "plan_batches",
    "tree_rows",
    "trie_mask",
    "with_lengths",
]

_MODULES = {
    "Batch": "batch",
    "Budget": "budget",
    "BudgetBatchSampler": "budget",
    "Layout": "layouts",
    "PairCollator": "collate",
    "flat_row": "layouts",
    "packed_rows": "layouts",
    "padded_rows": "layouts",
    "pair_units": "budget",
    "plan_batches": "budget",
    "tree_rows": "layouts",
    "trie_mask": "layouts",
    "with_lengths": "lengths",
}


def __getattr__(name: str) -> Any:
    # imported when asked for: most of it needs torch, and not all that stands here
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
