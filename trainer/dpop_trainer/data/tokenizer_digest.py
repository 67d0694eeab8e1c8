"""What tokenises, in a few letters: a cache of token ids is known by it.

`datasets` hashes an argument by pickling it in Python, which takes a second or more for the vocabulary and merges that
transformers keeps beside the Rust tokenizer made of them. Their JSON says the same, and C and Rust write it.
"""

import json
from typing import TYPE_CHECKING, Any

import xxhash
from datasets.fingerprint import Hasher

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_OF_NO_MATTER = ("cache", "deprecation_warnings")


def fingerprint_of(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", **others: Any) -> str:
    """What `Dataset.map` calls its result, for a function that these arguments determine, its code among them."""
    return Hasher.hash([dataset._fingerprint, tokenizer_digest(tokenizer), sorted(others.items())])


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of all that a tokenizer is, but for the padding and truncation that an earlier call may have left on."""
    kind = type(tokenizer)
    state = {name: value for name, value in vars(tokenizer).items() if name not in _OF_NO_MATTER}
    rust = state.pop("_tokenizer", None)
    if rust is None or kind.__module__.partition(".")[0] != "transformers":  # in Python, or with code of its own
        return Hasher.hash(tokenizer)
    # its JSON begins with version, truncation and padding
    digest = xxhash.xxh3_128(rust.to_str().partition('"added_tokens":')[2].encode())
    for name in sorted(state):
        try:
            value = json.dumps(state[name])
        except (TypeError, ValueError):
            value = Hasher.hash(state[name])
        digest.update(f"\n{name} {value}".encode())
    return f"{kind.__module__}.{kind.__qualname__} {digest.hexdigest()}"
