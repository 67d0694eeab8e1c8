"""Held-out preference pairs: how far the chosen answers moved, and whether they are told from the rejected ones."""

import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from dpop_trainer.data import TokeniseCounts, read_pairs, tokenise_pairs
from dpop_trainer.measure.pairs_under_model import pair_token_logps
from dpop_trainer.models.trained import TrainedModel
from dpop_trainer.tools.evaluation.records import Metric, TaskResult

TASK = "pairs"


class AnswerLogps(NamedTuple):
    """Log-probs of the two answers of one pair, in nats per answer."""

    chosen: float
    rejected: float


def load_held_out(source: str, split: str, limit: int | None) -> Dataset:
    """The pairs, the first `limit` of them.

    Raises:
        ValueError, FileNotFoundError: they cannot be loaded.
    """
    pairs = read_pairs(source, split)
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
    dataset, counts = tokenise_pairs(pairs, trained.tokenizer, max_length=max_length, on_bad_record="skip")
    logps = pair_token_logps(
        trained.model,
        dataset,
        pad_token_id=trained.tokenizer.pad_token_id,  # type: ignore[arg-type]
        batch_size=batch_size,
        desc=TASK,
    )
    pair_ids = _pair_ids(trained, dataset)
    by_answer = {
        "chosen_logps": [float(pair.chosen.sum(dtype=np.float64)) for pair in logps],
        "rejected_logps": [float(pair.rejected.sum(dtype=np.float64)) for pair in logps],
    }
    figures = {
        "chosen_likelier": [
            float(chosen > rejected)
            for chosen, rejected in zip(by_answer["chosen_logps"], by_answer["rejected_logps"], strict=True)
        ],
        **by_answer,
    }
    return TaskResult(
        task=TASK,
        metrics={name: metric_of(dict(zip(pair_ids, values, strict=True))) for name, values in figures.items()},
        main_metric="chosen_likelier",
        num_questions=len(dataset),
        num_fewshot=None,
        num_truncated=counts.truncated_prompts + counts.truncated_chosen + counts.truncated_rejected,
        seconds=round(time.monotonic() - started, 1),
        key={},
        notes=_notes(counts),
    )


def compare_with_reference(policy: TaskResult, reference: TaskResult) -> dict[str, Metric] | None:
    """A model against the one that training started from: chosen Δ, rejected Δ, reward accuracy.

    Returns:
        None where the two kept different pairs: their tokenizers cut or drop others.
    """
    ours, theirs = _answer_logps(policy), _answer_logps(reference)
    if ours.keys() != theirs.keys():
        return None
    figures: dict[str, dict[str, float]] = {"chosen Δ": {}, "rejected Δ": {}, "reward accuracy": {}}
    for pair, (chosen, rejected) in ours.items():
        changes = (chosen - theirs[pair].chosen, rejected - theirs[pair].rejected)
        figures["chosen Δ"][pair], figures["rejected Δ"][pair] = changes
        figures["reward accuracy"][pair] = float(changes[0] > changes[1])
    return {name: metric_of(shares) for name, shares in figures.items()}


def metric_of(shares: dict[str, float]) -> Metric:
    """The mean over questions with its standard error."""
    values = np.array(list(shares.values()))
    stderr = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Metric(float(values.mean()), stderr, shares)


def _pair_ids(trained: TrainedModel, dataset: Dataset) -> list[str]:
    """A name for each pair made of its text, so that models which keep different pairs are not mixed up."""
    records: Any = dataset
    ids: list[str] = []
    seen: Counter[str] = Counter()
    for record in records:
        texts = [
            trained.tokenizer.decode(record[name], skip_special_tokens=True)
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        ]
        digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:12]
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest} {seen[digest]}")
    return ids


def _answer_logps(result: TaskResult) -> dict[str, AnswerLogps]:
    chosen, rejected = (result.metrics[name].by_question for name in ("chosen_logps", "rejected_logps"))
    assert chosen is not None
    assert rejected is not None
    return {pair: AnswerLogps(chosen[pair], rejected[pair]) for pair in chosen}


def _notes(counts: TokeniseCounts) -> list[str]:
    dropped = counts.num_pairs_in - counts.num_pairs
    cut = counts.truncated_prompts + counts.truncated_chosen + counts.truncated_rejected
    notes = [f"{dropped} of {counts.num_pairs_in} pairs dropped"] if dropped else []
    return notes + ([f"{cut} prompts or answers cut to the model's length"] if cut else [])
