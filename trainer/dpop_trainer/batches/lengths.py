"""How long the pairs of a data set are, for batches of pairs of like length."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from dpop_trainer.batches.layouts import tree_length
from dpop_trainer.data.pair_tree import PairTree
from dpop_trainer.data.records import TOKEN_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset


def read_trees(dataset: "Dataset", *, prefix_sharing: bool, desc: str) -> Iterator[PairTree]:
    """The trees of a tokenised data set, in its order, with a progress bar named `desc`."""
    columns = dataset.select_columns(list(TOKEN_COLUMNS))
    for batch in tqdm(columns.iter(1000), desc=desc, total=-(-len(dataset) // 1000), leave=False):
        for ids in zip(*(batch[column] for column in TOKEN_COLUMNS), strict=True):
            yield PairTree.from_ids(*ids, share_prefix=prefix_sharing)


def with_lengths(dataset: "Dataset", column: str, *, prefix_sharing: bool) -> "Dataset":
    """The data set with the number of columns of each pair's tree, unless it has such a column already.

    Args:
        dataset: from `tokenise_pairs`.
        column: the name that the lengths get.
        prefix_sharing: as the collator's.
    """
    if column in dataset.column_names:
        return dataset
    trees = read_trees(dataset, prefix_sharing=prefix_sharing, desc="Measuring pairs")
    return dataset.add_column(column, [tree_length(tree) for tree in trees])
