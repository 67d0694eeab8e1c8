"""A tokenizer that names no end of sequence: the doctor says so, and goes on with the likeliest."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedTokenizerBase

_KNOWN = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end|>")
_MADE_UP = "<|end of sequence|>"


def take_end_token(tokenizer: "PreTrainedTokenizerBase", stop_ids: "Collection[int]") -> str | None:
    """Give a tokenizer without an end of sequence one, since each answer is counted with it.

    Args:
        tokenizer: changed in place where it names none.
        stop_ids: the tokens at which the model stops, where that is known.

    Returns:
        What was taken: a token at which the model stops, else a usual name for one that is in the vocabulary, else one
        that is added to it. None: the tokenizer names its own.
    """
    if tokenizer.eos_token_id is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    stops = (token for token, number in vocabulary.items() if number in stop_ids)
    end = next(stops, None) or next((token for token in _KNOWN if token in vocabulary), _MADE_UP)
    tokenizer.add_special_tokens({"eos_token": end})
    return end
