"""What a model says of pairs before it is trained on them: reference margins, and the CHES score.

With h(x, y[<k]) the hidden state that predicts token k of answer y, that is, the input of the model's head:

    H_w = Σ_k h(x, y_w[<k])        H_l = Σ_k h(x, y_l[<k])                     over all tokens of each answer
    CHES             = <H_w, H_l> - |H_w|²
    length-normalised  = <H_w, H_l> / (T_w T_l) - |H_w|² / T_w²  =  <m_w, m_l - m_w>       with the means m = H / T

The higher the score, the more a step that prefers y_w to y_l takes from y_w itself. Edit distance does not tell: it
knows nothing of how alike two answers are to the model.

Source: Razin et al. 2024, arXiv:2410.08847, Definition 2 (CHES); the length-normalised score is the one by which its
section 6 filters data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from dpop_trainer.batches.scoring import answer_batches, scoring
from dpop_trainer.models.positions import check_positions


class Ches(NamedTuple):
    """Of one pair."""

    score: float
    normalised: float


class ModelScores(NamedTuple):
    """Of pairs under one model, all [n] fp64, in the data set's order."""

    rows: NDArray[np.int64]
    """Each pair's row in the file."""
    chosen_logps: NDArray[np.float64]
    """Summed over the answer's tokens, in nats."""
    rejected_logps: NDArray[np.float64]
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]
    ches: NDArray[np.float64]
    ches_normalised: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """log π_ref(y_w|x) - log π_ref(y_l|x), in nats. Negative: the model prefers the rejected answer."""
        return self.chosen_logps - self.rejected_logps

    @property
    def normalised_margins(self) -> NDArray[np.float64]:
        """The same of means per token."""
        return self.chosen_logps / self.chosen_tokens - self.rejected_logps / self.rejected_tokens


def ches_score(chosen_hidden_states: Tensor, rejected_hidden_states: Tensor) -> Ches:
    """The CHES score of one pair, computed in fp64.

    Args:
        chosen_hidden_states: [T_w, H] the head's inputs that predict the chosen answer's tokens: the first is that of
            the prompt's last token, the last that of the answer's last token but one.
        rejected_hidden_states: [T_l, H] the rejected answer's.

    Raises:
        ValueError: an answer has no token.

    Source:
        Razin et al. 2024, arXiv:2410.08847, Definition 2; length-normalised: section 6.
    """
    if not len(chosen_hidden_states) or not len(rejected_hidden_states):
        raise ValueError(
            "hidden_states: expected at least one token in either answer, "
            f"got {len(chosen_hidden_states)} and {len(rejected_hidden_states)}."
        )
    chosen, rejected = chosen_hidden_states.double().sum(0), rejected_hidden_states.double().sum(0)
    mean_chosen, mean_rejected = chosen / len(chosen_hidden_states), rejected / len(rejected_hidden_states)
    # centred before the product: where the answers are alike, two large numbers would cancel
    return Ches(float(chosen @ (rejected - chosen)), float(mean_chosen @ (mean_rejected - mean_chosen)))


def score_pairs(
    model: Any, dataset: Dataset, *, pad_token_id: int, batch_size: int = 8, desc: str | None = "Scoring pairs"
) -> ModelScores:
    """One forward per batch of pairs -> log-probs of both answers, and CHES.

    Args:
        model: a causal LM without a ScoringHead; it is given one for the duration, and eval mode.
        dataset: tokenised pairs, as `tokenise_pairs` returns them.
        pad_token_id: any token; padding is masked.
        batch_size: pairs per forward.
        desc: of the progress bar; None shows none.

    Raises:
        ValueError: a pair has more tokens than the model has learned positions.
    """
    check_positions(model, dataset)
    rows: list[tuple[float, ...]] = []
    with scoring(model) as scored, _head_inputs(model) as captured:
        device = next(model.parameters()).device
        for batch in answer_batches(
            dataset, pad_token_id=pad_token_id, batch_size=batch_size, device=device, desc=desc
        ):
            logps = scored.token_logps(batch).double()
            hidden_states = captured.pop()
            predictors = hidden_states.reshape(-1, hidden_states.shape[-1])[batch.score_positions]
            bounds = batch.cu_seqlens.tolist()
            for b, pair_id in enumerate(batch.pair_ids.tolist()):  # segments: shared (empty), chosen, rejected
                _, chosen, rejected, end = bounds[3 * b : 3 * b + 4]
                score = ches_score(predictors[chosen:rejected], predictors[rejected:end])
                sums = logps[chosen:rejected].sum(), logps[rejected:end].sum()
                rows.append((pair_id, float(sums[0]), float(sums[1]), rejected - chosen, end - rejected, *score))
    columns = np.array(rows, np.float64).reshape(len(rows), len(ModelScores._fields)).T
    integers = {"rows", "chosen_tokens", "rejected_tokens"}
    return ModelScores(
        *(
            column.astype(np.int64) if name in integers else column
            for name, column in zip(ModelScores._fields, columns, strict=True)
        )
    )


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's ρ: the correlation of the ranks, ties sharing theirs. NaN where one of the two does not vary."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    if len(a) < 2 or not ranks_a.std() or not ranks_b.std():
        return float("nan")
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


@contextmanager
def _head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """What the model's head is given from here on, forward by forward."""
    layer = model.get_output_embeddings()
    assert layer is not None  # ScoringHead has refused such a model
    captured: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        hook.remove()
