"""Measure a model on preference pairs: per-token log-probs, shifts against the reference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch import nn

from dpop_trainer.batches.scoring import answer_batches, scoring
from dpop_trainer.data.edits import edit_regions
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
