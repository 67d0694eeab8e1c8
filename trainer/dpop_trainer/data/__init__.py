"""From preference pairs on disk to batches of tensors: load, check, tokenise, collate."""

from dpop_trainer.data.collate import PairCollator
from dpop_trainer.data.convert import check_pairs
from dpop_trainer.data.counts import TokeniseCounts
from dpop_trainer.data.layouts import Layout, padded_rows, tree_mask, tree_rows
from dpop_trainer.data.load import load_pairs
from dpop_trainer.data.pair_tree import PairTree
from dpop_trainer.data.read import read_pairs
from dpop_trainer.data.skipped import SkippedRecords
from dpop_trainer.data.stream import SourceStream, TokenisedStream
from dpop_trainer.data.tokenise import tokenise_pairs

__all__ = [
    "Layout",
    "PairCollator",
    "PairTree",
    "SkippedRecords",
    "SourceStream",
    "TokeniseCounts",
    "TokenisedStream",
    "check_pairs",
    "load_pairs",
    "padded_rows",
    "read_pairs",
    "tokenise_pairs",
    "tree_mask",
    "tree_rows",
]
