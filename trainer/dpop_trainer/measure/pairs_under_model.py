"""Measure a model on preference pairs: per-token log-probs, shifts against the reference, exact match of answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dpop_trainer.batches.scoring import answer_batches, scoring
from dpop_trainer.data.edits import edit_regions
from dpop_trainer.measure.stop_tokens import stop_token_ids, until_stop
from dpop_trainer.measure.token_shift import TokenShift, token_shift
from dpop_trainer.models.positions import check_positions

# a hundredth of a nat: above what rounding in bf16 makes of a token, and 1 % of its probability
LOST_NATS = 0.01


class PairTokenLogps(NamedTuple):
    """Per-token log-probs of one pair's two answers, in nats, fp32."""

    chosen: np.ndarray
    rejected: np.ndarray


class Ranking(NamedTuple):
    """How often one model alone finds the chosen answer the likelier one: shares of pairs. Ties count as wrong.

    Source: Chen et al. 2024, "Preference Learning Algorithms Do Not Learn Preference Rankings", arXiv:2405.19534,
    section 2.
    """

    accuracy: float
    """Of pairs with log π(y_w|x) > log π(y_l|x)."""
    normalised_accuracy: float
    """The same, each log-prob divided by its answer's number of tokens."""


class PairEvaluation(NamedTuple):
    """A policy against its reference on preference pairs. Log-ratios are nats per answer, means over pairs."""

    chosen_logratio: float
    chosen_logratio_error: float
    """Standard error of that mean over the pairs; NaN for a single pair."""
    rejected_logratio: float
    rejected_logratio_error: float
    reward_accuracy: float
    """Share of pairs whose chosen answer gained more than its rejected one."""
    ranking: Ranking
    ref_ranking: Ranking
    lost_share: float
    """Share of the chosen answers' tokens that lost more than `LOST_NATS` of their log-prob."""
    shift: TokenShift
    """Change per token of the chosen answers before, at and after the edit."""
    rejected_shift: TokenShift
    """The same of the rejected answers."""


def pair_token_logps(
    model: nn.Module, dataset: Dataset, *, pad_token_id: int, batch_size: int = 16, desc: str | None = None
) -> list[PairTokenLogps]:
    """Log-probs of every completion token of every pair, in the data set's order.

    Args:
        model: a causal LM without a ScoringHead; it is given one for the duration.
        dataset: tokenised pairs, as `tokenise_pairs` returns them.
        pad_token_id: any token; padding is masked.
        batch_size: pairs per forward.
        desc: label of the progress bar; None shows none.

    Raises:
        ValueError: a pair has more tokens than the model has learned positions.
    """
    check_positions(model, dataset)
    results: list[PairTokenLogps] = []
    with scoring(model) as scored:
        device = next(model.parameters()).device
        for batch in answer_batches(
            dataset, pad_token_id=pad_token_id, batch_size=batch_size, device=device, desc=desc
        ):
            values = scored.token_logps(batch).float().cpu().numpy()
            bounds = batch.cu_seqlens.tolist()
            for b in range(len(bounds) // 3):  # segments: shared (empty), chosen, rejected
                _, chosen, rejected, end = bounds[3 * b : 3 * b + 4]
                results.append(PairTokenLogps(values[chosen:rejected], values[rejected:end]))
    return results


def evaluate_pairs(
    policy: Sequence[PairTokenLogps], reference: Sequence[PairTokenLogps], dataset: Dataset
) -> PairEvaluation:
    """Hold a policy's token log-probs against the reference's on the same pairs.

    Raises:
        ValueError: the two lists and the data set differ in length.
    """
    if not len(policy) == len(reference) == len(dataset):
        raise ValueError(
            f"policy, reference: expected log-probs of all {len(dataset)} pairs, "
            f"got {len(policy)} and {len(reference)}."
        )
    chosen = np.array([p.chosen.sum() - r.chosen.sum() for p, r in zip(policy, reference, strict=True)])
    rejected = np.array([p.rejected.sum() - r.rejected.sum() for p, r in zip(policy, reference, strict=True)])
    records: Any = dataset
    answers = [(record["chosen_ids"], record["rejected_ids"]) for record in records]
    changes = np.concatenate([p.chosen - r.chosen for p, r in zip(policy, reference, strict=True)])
    return PairEvaluation(
        chosen_logratio=float(chosen.mean()),
        chosen_logratio_error=_standard_error(chosen),
        rejected_logratio=float(rejected.mean()),
        rejected_logratio_error=_standard_error(rejected),
        reward_accuracy=float((chosen > rejected).mean()),
        ranking=_ranking(policy),
        ref_ranking=_ranking(reference),
        lost_share=float((changes < -LOST_NATS).mean()),
        shift=token_shift(
            [p.chosen for p in policy],
            [r.chosen for r in reference],
            [edit_regions(chosen_ids, rejected_ids) for chosen_ids, rejected_ids in answers],
        ),
        rejected_shift=token_shift(
            [p.rejected for p in policy],
            [r.rejected for r in reference],
            [edit_regions(rejected_ids, chosen_ids) for chosen_ids, rejected_ids in answers],
        ),
    )


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _ranking(logps: Sequence[PairTokenLogps]) -> Ranking:
    return Ranking(
        accuracy=float(np.mean([pair.chosen.sum() > pair.rejected.sum() for pair in logps])),
        normalised_accuracy=float(np.mean([pair.chosen.mean() > pair.rejected.mean() for pair in logps])),
    )


@torch.no_grad()
def generate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    desc: str | None = None,
) -> list[str]:
    """Greedy completions of the prompts by a Hugging Face causal LM, in order; each ends before its first stop token.

    Args:
        model: the model.
        tokenizer: text prompts are tokenised as in training.
        prompts: texts, or token ids; padded on the left, those of like length together.
        max_new_tokens: longest completion.
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
    completions = [""] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in tqdm(range(0, len(rows), batch_size), desc=desc, disable=desc is None, leave=False):
        chunk = by_length[start : start + batch_size]
        length = len(rows[chunk[-1]])
        input_ids = torch.tensor([[pad_token_id] * (length - len(rows[i])) + rows[i] for i in chunk], device=device)
        mask = torch.tensor([[0] * (length - len(rows[i])) + [1] * len(rows[i]) for i in chunk], device=device)
        output = model.generate(input_ids, attention_mask=mask, generation_config=config)
        for i, ids in zip(chunk, output[:, length:].tolist(), strict=True):
            completions[i] = str(tokenizer.decode(until_stop(ids, stops), skip_special_tokens=True))
    return completions
