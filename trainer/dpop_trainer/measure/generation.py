"""What a model writes after prompts, and how: how long, whether it comes to an end, how much of it is repetition."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dpop_trainer.measure.stop_tokens import stop_token_ids, until_stop


class Completion(NamedTuple):
    """One answer of a model."""

    text: str
    ids: list[int]
    """Its tokens, without the one that ended it."""
    has_ended: bool
    """Whether one did, before there was no room left."""


class Writing(NamedTuple):
    """How a model writes, whatever it says: what can be told of answers without a judge."""

    num_tokens: float
    """Mean per answer."""
    ended_share: float
    """Of the answers: those that came to an end."""
    repeated_share: float
    """Of an answer's 4-grams of tokens, those that stood in it before; mean over answers that have one.

    Source: Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training", arXiv:1908.04319, seq-rep-4.
    """
    distinct_share: float
    """Distinct 2-grams of tokens in all answers together, of all their 2-grams: it falls where answers are alike, and
    where there are more of them.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
    arXiv:1510.03055, distinct-2.
    """

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> "Writing":
        """Shares of nothing are NaN."""
        all_ids = [completion.ids for completion in completions]
        repeated = [1 - len(set(grams)) / len(grams) for grams in (_grams(ids, 4) for ids in all_ids) if grams]
        pairs = [gram for ids in all_ids for gram in _grams(ids, 2)]
        return cls(
            num_tokens=_mean([len(ids) for ids in all_ids]),
            ended_share=_mean([completion.has_ended for completion in completions]),
            repeated_share=_mean(repeated),
            distinct_share=len(set(pairs)) / len(pairs) if pairs else float("nan"),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(n)), strict=False))


@torch.no_grad()
def generate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    desc: str | None = None,
) -> list[Completion]:
    """Greedy completions of the prompts by a Hugging Face causal LM, in order; each ends before its first stop token.

    Args:
        model: the model.
        tokenizer: text prompts are tokenised as in training.
        prompts: texts, or token ids; padded on the left, those of like length together.
        max_new_tokens: most tokens of a completion.
        batch_size: prompts that are continued together.
        desc: label of the progress bar; None shows none.
    """
    device = next(model.parameters()).device
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stops = stop_token_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=pad_token_id,
    )
    rows: list[list[int]] = [
        list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)  # type: ignore[arg-type]
        for prompt in prompts
    ]
    completions: dict[int, Completion] = {}
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in tqdm(range(0, len(rows), batch_size), desc=desc, disable=desc is None, leave=False):
        chunk = by_length[start : start + batch_size]
        length = len(rows[chunk[-1]])
        input_ids = torch.tensor([[pad_token_id] * (length - len(rows[i])) + rows[i] for i in chunk], device=device)
        mask = torch.tensor([[0] * (length - len(rows[i])) + [1] * len(rows[i]) for i in chunk], device=device)
        output = model.generate(input_ids, attention_mask=mask, generation_config=config)
        for i, ids in zip(chunk, output[:, length:].tolist(), strict=True):
            written = until_stop(ids, stops)
            text = str(tokenizer.decode(written, skip_special_tokens=True))
            completions[i] = Completion(text, written, has_ended=len(written) < len(ids))
    return [completions[i] for i in range(len(rows))]
