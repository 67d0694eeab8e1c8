"""Log-probs of texts that training is not about, before and after it: what a model unlearns shows there.

A loss on preference pairs says nothing of all other text; whatever it does to the weights, the likelihood of ordinary
prose tells it without a judge and with little noise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dpop_trainer.batches.scoring import scoring
from dpop_trainer.models.positions import learned_positions

COLUMN = "text"
DEFAULT_MAX_LENGTH = 1024
"""Of a text, in tokens, where a run sets no length."""


class TextLogps(NamedTuple):
    """Texts under one model. Of a text every token but the first is scored."""

    sums: np.ndarray
    """[number of texts] fp64, nats per text."""
    num_tokens: np.ndarray
    """[number of texts] int64: scored ones."""


class TextShift(NamedTuple):
    """Texts under a policy and its reference, in nats per token, mean over all tokens."""

    num_texts: int
    num_tokens: int
    ref_mean: float
    policy_mean: float
    error: float
    """Standard error of their difference over texts, as of a ratio of two sums; NaN for a single text."""

    @property
    def mean_change(self) -> float:
        return self.policy_mean - self.ref_mean

    @classmethod
    def of(cls, policy: TextLogps, reference: TextLogps) -> "TextShift":
        """Hold both against each other, text by text."""
        lengths, changes = policy.num_tokens, policy.sums - reference.sums
        num_texts, num_tokens = len(lengths), int(lengths.sum())
        residuals = changes - changes.sum() / num_tokens * lengths
        error = np.sqrt(num_texts / (num_texts - 1) * (residuals**2).sum()) / num_tokens if num_texts > 1 else np.nan
        ref_mean, policy_mean = (float(logps.sums.sum() / num_tokens) for logps in (reference, policy))
        return cls(num_texts, num_tokens, ref_mean, policy_mean, float(error))


def texts_of(dataset: Dataset, source: str, max_texts: int) -> list[str]:
    """The first so many texts that are not blank.

    Args:
        dataset: with a column "text".
        source: where it is from, for messages.
        max_texts: most of them.

    Raises:
        ValueError: there is no such column, it holds something else than text, or nothing but blank ones.
    """
    if COLUMN not in dataset.column_names:
        raise ValueError(
            f"neutral_texts: expected a column {COLUMN!r}, got {', '.join(sorted(dataset.column_names))} in {source}. "
            "Rename the one that holds the texts."
        )
    found: list[str] = []
    for row, text in enumerate(dataset[COLUMN]):
        if not isinstance(text, str):
            raise ValueError(f"neutral_texts: row {row} of {source}: expected a text, got {type(text).__name__}.")
        if text.strip():
            found.append(text)
        if len(found) == max_texts:
            break
    if not found:
        raise ValueError(f"neutral_texts: expected at least one text that is not blank, got none in {source}.")
    return found


def token_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
    """Texts as in pretraining: without a chat template, cut at the end.

    Raises:
        ValueError: no text has two tokens, of which the second would be scored.
    """
    rows = [list(tokenizer(text)["input_ids"])[: max_length or DEFAULT_MAX_LENGTH] for text in texts]  # type: ignore[arg-type]
    if not any(len(row) > 1 for row in rows):
        raise ValueError(
            f"neutral_texts: expected a text of at least two tokens, got {len(rows)} of one. The first token of a text "
            "is not scored."
        )
    return rows


def text_logps(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    desc: str | None = None,
) -> TextLogps:
    """Log-probs of whole texts.

    Args:
        model: a causal LM without a ScoringHead; it is given one for the duration.
        tokenizer: the model's.
        texts: not blank. One of a single token has nothing to be scored, and counts for nothing.
        max_length: most tokens of a text; None: `DEFAULT_MAX_LENGTH`. Never more than the model has positions.
        batch_size: texts per forward, those of like length together.
        desc: label of the progress bar; None shows none.

    Raises:
        ValueError: no text has two tokens.
    """
    limits = [limit for limit in (max_length or DEFAULT_MAX_LENGTH, learned_positions(model)) if limit is not None]
    rows = token_rows(tokenizer, texts, min(limits))
    sums = np.zeros(len(rows))
    by_length = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: len(rows[i]))
    with scoring(model) as scored:
        for start in tqdm(range(0, len(by_length), batch_size), desc=desc, disable=desc is None, leave=False):
            chunk = by_length[start : start + batch_size]
            logps = _row_logps([rows[i] for i in chunk], scored, tokenizer.pad_token_id or 0)
            for i, values in zip(chunk, logps, strict=True):
                sums[i] = values.double().sum().item()
    return TextLogps(sums, np.array([len(row) - 1 for row in rows], dtype=np.int64))


def _row_logps(rows: Sequence[list[int]], scored: Any, pad_token_id: int) -> tuple[torch.Tensor, ...]:
    """One forward over padded rows -> of each the log-probs of its tokens but the first."""
    device, width = next(scored.model.parameters()).device, max(map(len, rows))
    input_ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    positions = [b * width + t for b, row in enumerate(rows) for t in range(len(row) - 1)]
    targets = [token_id for row in rows for token_id in row[1:]]
    logps = scored.head.token_logps(
        scored.model,
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
        input_ids=input_ids,
        attention_mask=mask,
    )
    return logps.cpu().split([len(row) - 1 for row in rows])
