"""From preference pairs on disk to token ids: read, recognised by form, checked, tokenised, cut, counted.

Imports nothing of the project. A new form is one converter and one entry in `forms.py`. What is cached is known by the
source of everything that made it (`code_hash`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpop_trainer.data.convert import check_pairs
    from dpop_trainer.data.counts import TokeniseCounts
    from dpop_trainer.data.load import load_pairs
    from dpop_trainer.data.pair_tree import PairTree
    from dpop_trainer.data.read import read_pairs
    from dpop_trainer.data.skipped import SkippedRecords
    from dpop_trainer.data.stream import SourceStream, TokenisedStream
    from dpop_trainer.data.tokenise import tokenise_pairs

__all__ = [
    "PairTree",
    "SkippedRecords",
    "SourceStream",
    "TokeniseCounts",
    "TokenisedStream",
    "check_pairs",
    "load_pairs",
    "read_pairs",
    "tokenise_pairs",
]

_MODULES = {
    "PairTree": "pair_tree",
    "SkippedRecords": "skipped",
    "SourceStream": "stream",
    "TokeniseCounts": "counts",
    "TokenisedStream": "stream",
    "check_pairs": "convert",
    "load_pairs": "load",
    "read_pairs": "read",
    "tokenise_pairs": "tokenise",
}


def __getattr__(name: str) -> Any:
    # imported when asked for: reading pairs, and looking at them, needs no torch, as batches do
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
