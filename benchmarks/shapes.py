"""The sizes that are measured, by the names of the models and data sets they come from.

head_shape("Llama-3-8B")       V, H and softcap of the published model
head_shape("Llama-3-8B/8")     V and H divided by 8: for a CPU
model_size("Llama-3-8B")       all that arithmetic and memory depend on, for `scale`
make_pairs(METAMATH, ...)      token ids of pairs with a data set's lengths
"""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpop_trainer.tools.plan.known_models import SHAPES

from benchmarks.scale import ModelSize


@dataclass(frozen=True)
class HeadShape:
    """One model's head."""

    name: str
    vocab_size: int
    hidden_size: int
    softcap: float | None = None
    """Gemma's final_logit_softcapping."""


KNOWN = {
    "Llama-3.2-1B": "Llama-3.2-1B",
    "Llama-3-8B": "Llama-3-8B",
    "Mistral-7B": "Mistral-7B-v0.1",
    "Qwen2.5-7B": "Qwen2.5-7B",
    "Gemma-2-9B": "gemma-2-9b",
    "Qwen2.5-72B": "Qwen2.5-72B",
}
"""What is measured -> its name in the table of published models."""

HEADS = tuple(
    HeadShape(
        name, SHAPES[known]["vocab_size"], SHAPES[known]["hidden_size"], SHAPES[known].get("final_logit_softcapping")
    )
    for name, known in KNOWN.items()
)


def model_size(known: str) -> ModelSize:
    """The sizes of a published model, by its name in `SHAPES`."""
    shape = SHAPES[known]
    return ModelSize(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        head_dim=shape.get("head_dim"),
        tied_embeddings=shape["tie_word_embeddings"],
    )


def head_shape(name: str) -> HeadShape:
    """The head called `name`; "/8" at the end divides V and H by 8.

    Raises:
        ValueError: no model has this name, or its sizes cannot be divided so.
    """
    model, _, divisor = name.partition("/")
    known = {head.name: head for head in HEADS}
    if model not in known:
        raise ValueError(f"name: expected one of {sorted(known)}, with or without /8, got {name!r}.")
    head, factor = known[model], int(divisor or 1)
    if head.vocab_size % factor or head.hidden_size % factor:
        raise ValueError(f"name: expected a divisor of {head.vocab_size} and {head.hidden_size}, got {name!r}.")
    return dataclasses.replace(
        head, name=name, vocab_size=head.vocab_size // factor, hidden_size=head.hidden_size // factor
    )


def gemma_3_1b() -> Any:
    """The configuration of google/gemma-3-1b-pt, from its config.json: a window of 512 tokens in most layers."""
    from transformers import AutoConfig  # the other shapes need none

    return AutoConfig.for_model(
        "gemma3_text",
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    )


@dataclass(frozen=True)
class PairShape:
    """Lengths in tokens of a data set's pairs, and how much the two answers have in common."""

    name: str
    prompt: int
    completion: int
    low_edit: bool
    """The rejected answer is the chosen one with one token replaced; else the two begin differently."""


METAMATH = PairShape("MetaMath-like", prompt=120, completion=220, low_edit=True)
ULTRAFEEDBACK = PairShape("UltraFeedback-like", prompt=200, completion=350, low_edit=False)
SPREAD = 0.3
"""Lengths are uniform within this fraction of the mean."""


class PairIds(NamedTuple):
    """One pair's token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def num_shared(self) -> int:
        """Tokens that both answers begin with."""
        both = zip(self.chosen_ids, self.rejected_ids, strict=False)
        equal = [chosen == rejected for chosen, rejected in both]
        return equal.index(False) if False in equal else len(equal)


def make_pairs(shape: PairShape, num_pairs: int, vocab_size: int, *, seed: int = 0, scale: int = 1) -> list[PairIds]:
    """Pairs of uniformly drawn tokens whose lengths are those of `shape`; the edit's place is uniform.

    Args:
        shape: lengths, and what the answers share.
        num_pairs: B.
        vocab_size: ids are in [0, vocab_size), at least 2.
        seed: the same seed gives the same pairs.
        scale: divides all lengths, for rehearsals.
    """
    draw = random.Random(seed)

    def tokens(mean: int) -> list[int]:
        mean = max(2, mean // scale)
        length = draw.randint(max(1, round(mean * (1 - SPREAD))), round(mean * (1 + SPREAD)))
        return [draw.randrange(vocab_size) for _ in range(length)]

    def another(token_id: int) -> int:
        return (token_id + draw.randrange(1, vocab_size)) % vocab_size

    pairs = []
    for _ in range(num_pairs):
        prompt, chosen = tokens(shape.prompt), tokens(shape.completion)
        rejected = list(chosen) if shape.low_edit else tokens(shape.completion)
        place = draw.randrange(len(chosen)) if shape.low_edit else 0
        rejected[place] = another(chosen[place])
        pairs.append(PairIds(prompt, chosen, rejected))
    return pairs


def segment_lengths(pairs: list[PairIds]) -> list[int]:
    """Shared tokens, chosen tail and rejected tail of each pair in turn, [3B]."""
    lengths = []
    for pair in pairs:
        shared = pair.num_shared
        lengths += [shared, len(pair.chosen_ids) - shared, len(pair.rejected_ids) - shared]
    return lengths
