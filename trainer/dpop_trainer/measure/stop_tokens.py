"""What ends a model's answer: one rule for every place that lets a model write."""

from collections.abc import Collection, Sequence
from typing import Any


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: all that the model's generation_config names, and the tokenizer's end of sequence.

    A chat model often has several, such as an end of turn beside the end of text, and its tokenizer knows one of them.

    Args:
        model: a causal LM, or an adapter around one.
        tokenizer: its tokenizer.

    Returns:
        Sorted, each once; empty where neither names one.
    """
    named: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return sorted({*named, tokenizer.eos_token_id} - {None})


def until_stop(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """A generated row up to its first stop token, which is left out: not every tokenizer knows it as a special one."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])
