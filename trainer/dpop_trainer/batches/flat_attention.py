"""Attention for the flat layout, in which all pairs of a batch stand in one row: what is not seen is not computed.

On CUDA that is FlexAttention, under a block mask made on the device from one number per position. FlexAttention has no
backward on a CPU; there each sequence's own columns attend to the columns of their sequence, one call of sdpa each.

Both are one attention implementation of transformers, named `FLAT_ATTENTION`. Given any other mask, or none, it is
sdpa: rows, trees, evaluation and generation work under it as they did before.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLAT_ATTENTION = "dpop_flat"
"""The name in `config._attn_implementation`."""

BLOCK_SIZE = 128
"""Positions per block of FlexAttention's mask. Rows of a multiple of it need no kernel of their own for the rest."""


class AttentionCall(NamedTuple):
    """What one layer of a model gave its attention."""

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Any
    kwargs: dict[str, Any]


class Run(NamedTuple):
    """Neighbouring columns of one sequence: all that it does not share with the sequences before it."""

    length: int
    beginning: list[tuple[int, int]]
    """What its sequence begins with and shares with others, in order: earlier runs, and how many of the first columns
    of each."""


def flat_mask(trie_ends: Tensor) -> Any:
    """What stands for the mask in a flat row: a `BlockMask` on CUDA, elsewhere the ends themselves as [R, 1, 1, T].

    Args:
        trie_ends: [R, T] int64, from `flat_row`: position q sees position k where k <= q < trie_ends[k].
    """
    if trie_ends.device.type != "cuda":
        return trie_ends[:, None, None, :]
    return block_mask(trie_ends)


def block_mask(trie_ends: Tensor, *, compiled: bool = True) -> BlockMask:
    """FlexAttention's mask of rows of tries [R, T]; nothing of size T x T is made.

    Args:
        trie_ends: [R, T] int64.
        compiled: False makes a mask of T x T on the way, for tests without a compiler.
    """

    def sees(b, h, q, k):
        return (k <= q) & (q < trie_ends[b, k])

    num_rows, length = trie_ends.shape
    return create_block_mask(sees, num_rows, None, length, length, device=trie_ends.device, _compile=compiled)


def runs(ends: list[int]) -> list[Run]:
    """A trie row cut wherever a column does not follow from the one before.

    Args:
        ends: T ends, of tokens or of padding.
    """
    starts = [0, *(column for column in range(1, len(ends)) if ends[column - 1] <= column)]
    found: list[Run] = []
    open_runs: list[tuple[int, int]] = []  # first columns of earlier runs that this one follows from
    for start, stop in itertools.pairwise([*starts, len(ends)]):
        # a run's ends never grow: what is still open is its first columns
        still_open = [
            (run, sum(end > start for end in ends[starts[run] : starts[run] + count])) for run, count in open_runs
        ]
        open_runs = [(run, count) for run, count in still_open if count]
        found.append(Run(stop - start, list(open_runs)))
        open_runs.append((len(found) - 1, stop - start))
    return found


def flat_attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [R, heads, T, D]
    key: Tensor,  # [R, key heads, T, D]
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention function -> ([R, T, heads, D], nothing)."""
    if isinstance(attention_mask, BlockMask):
        if torch.is_autocast_enabled(query.device.type):  # which knows sdpa, and leaves rotated queries in fp32 here
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if query.shape[2] % BLOCK_SIZE == key.shape[2] % BLOCK_SIZE == 0:
            # from a process's second length on there is one kernel for all, which cannot know this by itself and would
            # ask of each position whether it is within the row: half as many instructions again in its loops
            kwargs["kernel_options"] = {"IS_DIVISIBLE": True, **(kwargs.get("kernel_options") or {})}
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if not _is_flat(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert query.shape[0] == 1, query.shape
    kwargs.pop("is_causal", None)
    return attend_by_runs(module, query, key, value, runs(attention_mask.flatten().tolist()), **kwargs), None


def attend_by_runs(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,
    found: list[Run],
    **kwargs: Any,
) -> Tensor:
    """Attention of a flat row, one call of sdpa for each of its runs -> [1, T, heads, D]."""
    lengths = [run.length for run in found]
    # split, not sliced: the gradient of a slice is a whole tensor of zeros but for it
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs = []
    for i, (length, beginning) in enumerate(found):
        sequence_keys = torch.cat([*(keys[run][:, :, :count] for run, count in beginning), keys[i]], dim=2)
        sequence_values = torch.cat([*(values[run][:, :, :count] for run, count in beginning), values[i]], dim=2)
        num_before = sequence_keys.shape[2] - length
        seen = torch.ones(1, 1, length, num_before + length, dtype=torch.bool).tril(num_before) if beginning else None
        output, _ = sdpa_attention_forward(
            module, queries[i], sequence_keys, sequence_values, seen, is_causal=seen is None, **kwargs
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1)


@contextmanager
def first_call() -> Iterator[list[AttentionCall]]:
    """What the first layer gives the flat attention when a model runs a flat row while this lasts; else nothing."""
    calls: list[AttentionCall] = []

    def noted(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
        if not calls and _is_flat(attention_mask):
            calls.append(AttentionCall(module, query.detach(), key.detach(), value.detach(), attention_mask, kwargs))
        return flat_attention_forward(module, query, key, value, attention_mask, **kwargs)

    registered = ALL_ATTENTION_FUNCTIONS[FLAT_ATTENTION]
    AttentionInterface.register(FLAT_ATTENTION, noted)
    try:
        yield calls
    finally:
        AttentionInterface.register(FLAT_ATTENTION, registered)


def gradient_difference(call: AttentionCall) -> float:
    """How far the gradients of one flat attention are from those of sdpa under a mask of T x T, relative to these.

    Raises whatever the attention raises where it has no backward.
    """

    def gradients(attend: Any, mask: Any) -> Tensor:
        with torch.enable_grad():
            leaves = [states.nan_to_num().requires_grad_() for states in (call.query, call.key, call.value)]
            output, _ = attend(call.module, *leaves, mask, **call.kwargs)
            # by the values, which are the same in both
            found = torch.autograd.grad(output, leaves, output.detach())
        return torch.cat([grad.float().flatten() for grad in found])

    expected = gradients(sdpa_attention_forward, _dense(call.attention_mask))
    return float((gradients(flat_attention_forward, call.attention_mask) - expected).norm() / expected.norm())


def _is_flat(attention_mask: Any) -> bool:
    return isinstance(attention_mask, BlockMask) or (
        isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int64
    )


def _dense(attention_mask: Any) -> Tensor:
    """A flat row's mask as [1, 1, T, T] bool, queries by keys."""
    if isinstance(attention_mask, BlockMask):
        length = attention_mask.seq_lengths[0]
        device = str(attention_mask.kv_num_blocks.device)
        return create_mask(attention_mask.mask_mod, 1, 1, length, length, device=device)
    ends = attention_mask.reshape(1, 1, 1, -1)
    columns = torch.arange(ends.shape[-1], device=ends.device)
    return (columns <= columns[:, None]) & (columns[:, None] < ends)


def use_flat_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is sdpa run flat rows too.

    Raises:
        ValueError: the model's code does not look its attention up where transformers' interface puts it.
    """
    model.set_attn_implementation(FLAT_ATTENTION)
    if model.config.get_text_config()._attn_implementation != FLAT_ATTENTION:
        raise ValueError(f"{model.config.model_type} does not take an attention function of transformers' interface")


AttentionInterface.register(FLAT_ATTENTION, flat_attention_forward)
AttentionMaskInterface.register(FLAT_ATTENTION, sdpa_mask)
