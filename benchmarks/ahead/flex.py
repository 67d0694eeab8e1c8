"""Flat attention's kernels as FlexAttention writes them: this package's own masks, real models' heads."""

import copy
from typing import Any, NamedTuple
from unittest import mock

import torch
from dpop_trainer.batches import flat_attention
from dpop_trainer.batches.layouts import flat_row
from dpop_trainer.data.pair_tree import PairTree
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations import flex_attention as transformers_flex

from benchmarks.ahead.inductor import Template, templates, written_for
from benchmarks.shapes import METAMATH, make_pairs


class Heads(NamedTuple):
    """Of a model's attention."""

    queries: int
    keys: int
    size: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = {"Llama-3.2-1B": Heads(32, 8, 64), "Llama-3-8B": Heads(32, 8, 128), "Gemma-3-1B": Heads(4, 1, 256)}
LENGTHS = ("one length", "any length", "any length, blocks not filled")
"""A process's first batch has a kernel of its own; from the second length on there is one for all, and one for all that
are no multiple of a block, which the trainer's rows never are."""
NUM_PAIRS = 8


def rows(*, scale: int = 1) -> list[Tensor]:
    """`trie_ends` [1, T] of batches like MetaMath's pairs, one for each of `LENGTHS`; `scale` divides their lengths."""
    multiples = (flat_attention.BLOCK_SIZE, flat_attention.BLOCK_SIZE, None)
    return [_row(seed, multiple, scale) for seed, multiple in enumerate(multiples)]


def _row(seed: int, multiple: int | None, scale: int) -> Tensor:
    trees = [
        PairTree(
            pair.prompt_ids,
            pair.chosen_ids[: pair.num_shared],
            pair.chosen_ids[pair.num_shared :],
            pair.rejected_ids[pair.num_shared :],
        )
        for pair in make_pairs(METAMATH, NUM_PAIRS, 32000, seed=seed, scale=scale)
    ]
    return flat_row(trees, pad_token_id=0, pad_to_multiple_of=multiple)["trie_ends"]


def written(target: str, heads: Heads, trie_ends: list[Tensor]) -> dict[tuple[str, str], Template]:
    """By direction and one of `LENGTHS`, the kernels for such rows."""
    assert len({ends.shape[1] for ends in trie_ends}) == len(trie_ends)
    with (
        written_for(target) as modules,
        mock.patch.object(torch_flex, "_validate_device", _accept),  # which does not know "meta"
        mock.patch.object(transformers_flex.WrappedFlexAttention, "_instance", None),  # compiled once in a process
    ):
        for ends in trie_ends:
            _attend(heads, ends)
    found = {}
    for i, module in enumerate(modules):
        ((name, template),) = templates(module).items()
        found["backward" if "backward" in name else "forward", LENGTHS[i // 2]] = template
    return found


def computed_blocks(trie_ends: Tensor) -> tuple[int, int]:
    """Blocks of queries by keys that one head computes: those of which a part is seen, and those seen as a whole."""
    mask = flat_attention.block_mask(trie_ends, compiled=False)
    assert mask.full_kv_num_blocks is not None
    return int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())


def _accept(*_: Any) -> None:
    """Dynamo traces it, which it cannot do with a mock."""


def _attend(heads: Heads, trie_ends: Tensor) -> None:
    """Forward and backward as a layer of a model that trains would have them, without data."""
    length = trie_ends.shape[1]

    def states(num_heads: int) -> Tensor:
        return torch.empty(1, num_heads, length, heads.size, dtype=heads.dtype, device="meta", requires_grad=True)

    query, key, value = states(heads.queries), states(heads.keys), states(heads.keys)
    with mock.patch.object(torch, "is_autocast_enabled", return_value=False):  # which does not know "meta"
        output, _ = flat_attention.flat_attention_forward(
            nn.Module(), query, key, value, _without_data(trie_ends), scaling=heads.size**-0.5
        )
    output.sum().backward()


def _without_data(trie_ends: Tensor) -> BlockMask:
    """The block mask, its blocks counted on real data: what reads the ends within a block has none."""
    mask = copy.copy(flat_attention.block_mask(trie_ends, compiled=False))
    for name, value in vars(mask).items():
        if isinstance(value, Tensor):
            setattr(mask, name, value.to("meta"))

    def only_what_sees(sees: Any, *_: Any, **__: Any) -> Any:
        return sees

    with mock.patch.object(flat_attention, "create_block_mask", only_what_sees):
        mask.mask_mod = flat_attention.block_mask(trie_ends.to("meta"))  # type: ignore[assignment]
    return mask
