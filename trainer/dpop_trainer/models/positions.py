"""Models that learned a vector for each position (GPT-2, OPT) have so many positions; others have no bound."""

import re
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch import nn

from dpop_trainer.data.records import TOKEN_COLUMNS

# what families call the table: wpe, embed_positions, position_embeddings
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|\w*positions?(_embeddings?)?)(\.|$)")
_OTHER_TABLE = re.compile(r"vision|visual|image|audio|relative")


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens a sequence may have, or None where the model has no table of positions."""
    limits = [
        module.num_embeddings - _first_position(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name) and not _OTHER_TABLE.search(name)
    ]
    return min(limits, default=None)


def usable_positions(model: nn.Module, multiple: int | None) -> int | None:
    """The same in a batch whose rows are filled up to a multiple of so many columns: padding takes positions too."""
    limit = learned_positions(model)
    return limit if limit is None or multiple is None else limit // multiple * multiple


def check_positions(model: nn.Module, dataset: Dataset, name: str = "model") -> None:
    """
    Args:
        model: a causal LM.
        dataset: tokenised pairs, as `tokenise_pairs` returns them.
        name: what the message calls the model.

    Raises:
        ValueError: a pair is longer than the model has positions; names the first.
    """
    limit = learned_positions(model)
    if limit is None or not len(dataset):
        return
    table: Any = dataset.with_format("arrow")[:]
    prompt, chosen, rejected = (
        pc.list_value_length(table[column]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        for column in TOKEN_COLUMNS
    )
    lengths = prompt + np.maximum(chosen, rejected)
    too_long = np.flatnonzero(lengths > limit)
    if len(too_long):
        first = int(too_long[0])
        raise ValueError(
            f"{name}: expected pairs of at most {limit} tokens, for as many positions has it learned, got pair "
            f"{table['pair_id'][first].as_py()} with {lengths[first]} ({len(too_long)} pairs are longer). Set "
            f"max_length to {limit} or less."
        )


def _first_position(module: nn.Module) -> int:
    """OPT's and BioGPT's tables begin two rows down, RoBERTa's behind the row of the padding."""
    offset: Any = getattr(module, "offset", 0)
    padding: Any = getattr(module, "padding_idx", None)
    return offset or (0 if padding is None else padding + 1)
