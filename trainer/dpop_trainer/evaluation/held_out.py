"""Held-out preference pairs: how far the chosen answers moved, and whether they are told from the rejected ones."""

import hashlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from dpop_trainer.data import TokeniseCounts, load_pairs, tokenise_pairs
from dpop_trainer.evaluate import pair_token_logps
from dpop_trainer.evaluation.records import Metric, TaskResult
from dpop_trainer.trained import TrainedModel

TASK = "pairs"


class AnswerLogps(NamedTuple):
    """Log-probs of the two answers of every pair, in nats per answer, fp64. [P]"""

    chosen: np.ndarray
    rejected: np.ndarray


def load_held_out(source: str, split: str, limit: int | None) -> Dataset:
    """The pairs, the first `limit` of them.

    Raises:
        ValueError, FileNotFoundError: they cannot be loaded.
    """
    pairs = load_pairs(source, split)
    return pairs if limit is None else pairs.select(range(min(limit, len(pairs))))


def pairs_source(source: str, pairs: Dataset) -> str:
    """The name of the file or data set, and a hash of the pairs."""
    digest = hashlib.sha256()
    records: Any = pairs
    for record in records:
        digest.update(repr(sorted(record.items())).encode())
    return f"{Path(source).name} {digest.hexdigest()[:12]}"


def score_pairs(trained: TrainedModel, pairs: Dataset, *, batch_size: int, max_length: int | None) -> TaskResult:
    """One model on the pairs: whether it holds the chosen answer for likelier, and the log-probs to compare models by.

    Args:
        trained: the model and its tokenizer.
        pairs: as `load_held_out` returns them.
        batch_size: pairs per forward.
        max_length: longest prompt and answer in tokens; longer ones are cut and counted.

    Raises:
        ValueError: no pair is left.
    """
    started = time.monotonic()
    dataset, counts = tokenise_pairs(pairs, trained.tokenizer, max_length=max_length)
    logps = pair_token_logps(
        trained.model,
        dataset,
        pad_token_id=trained.tokenizer.pad_token_id,  # type: ignore[arg-type]
        batch_size=batch_size,
        desc=TASK,
    )
    # ids count the pairs that were kept: models that tokenise alike keep the same
    by_answer = {
        "chosen_logps": {f"pair {i}": float(pair.chosen.sum(dtype=np.float64)) for i, pair in enumerate(logps)},
        "rejected_logps": {f"pair {i}": float(pair.rejected.sum(dtype=np.float64)) for i, pair in enumerate(logps)},
    }
    likelier = {
        pair: float(by_answer["chosen_logps"][pair] > by_answer["rejected_logps"][pair])
        for pair in by_answer["chosen_logps"]
    }
    return TaskResult(
        task=TASK,
        metrics={name: metric_of(shares) for name, shares in {"chosen_likelier": likelier, **by_answer}.items()},
        main_metric="chosen_likelier",
        num_questions=len(dataset),
        num_fewshot=None,
        num_truncated=counts.truncated_prompts + counts.truncated_chosen + counts.truncated_rejected,
        seconds=round(time.monotonic() - started, 1),
        key={},
        notes=_notes(counts),
    )


def compare_with_reference(policy: TaskResult, reference: TaskResult) -> dict[str, Metric]:
    """A model against the one that training started from: chosen Δ, rejected Δ, reward accuracy.

    Raises:
        ValueError: the two kept different pairs, so that they cannot be held against each other.
    """
    ours, theirs = _answer_logps(policy), _answer_logps(reference)
    if len(ours.chosen) != len(theirs.chosen):
        raise ValueError(
            f"pairs: expected every model to keep the same pairs, got {len(ours.chosen)} and {len(theirs.chosen)}. "
            "Their tokenizers cut or drop different ones; give a larger --max_length."
        )
    chosen, rejected = ours.chosen - theirs.chosen, ours.rejected - theirs.rejected
    figures = {
        "chosen Δ": chosen,
        "rejected Δ": rejected,
        "reward accuracy": (chosen > rejected).astype(float),
    }
    return {name: metric_of({str(i): float(x) for i, x in enumerate(values)}) for name, values in figures.items()}


def metric_of(shares: dict[str, float]) -> Metric:
    """The mean over questions with its standard error."""
    values = np.array(list(shares.values()))
    stderr = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Metric(float(values.mean()), stderr, shares)


def _answer_logps(result: TaskResult) -> AnswerLogps:
    def values(name: str) -> np.ndarray:
        by_pair = result.metrics[name].by_question
        assert by_pair is not None
        return np.array(list(by_pair.values()))

    return AnswerLogps(values("chosen_logps"), values("rejected_logps"))


def _notes(counts: TokeniseCounts) -> list[str]:
    dropped = counts.num_pairs_in - counts.num_pairs
    cut = counts.truncated_prompts + counts.truncated_chosen + counts.truncated_rejected
    notes = [f"{dropped} of {counts.num_pairs_in} pairs dropped"] if dropped else []
    return notes + ([f"{cut} prompts or answers cut to the model's length"] if cut else [])
