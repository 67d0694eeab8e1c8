"""One loaded model on one task of lm-eval: figures, standard errors, and the figure of every question."""

import logging
import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import set_seed

from dpop_trainer.models.trained import TrainedModel
from dpop_trainer.tools.evaluation.records import Metric, TaskResult
from dpop_trainer.tools.evaluation.tasks import TaskRequest

SEED = 1234  # lm-eval's own


def harness_model(trained: TrainedModel, *, batch_size: str, max_length: int | None) -> Any:
    """The model as lm-eval's, in this process.

    It is given loaded: lm-eval's own loading of an adapter cuts the padding rows off the base's vocabulary, so that
    an adapter and its base would normalise over different rows.
    """
    from lm_eval.models.huggingface import HFLM

    make: Any = HFLM  # its decorators hide its parameters from a type checker
    return make(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=batch_size, max_length=max_length)


def run_task(
    lm: Any,
    loaded: dict[str, Any],
    request: TaskRequest,
    *,
    limit: int | None,
    apply_chat_template: bool,
    key: dict[str, Any],
) -> TaskResult:
    """Evaluate; lm-eval shows the progress.

    Args:
        lm: from `harness_model`.
        loaded: the entry of `load_tasks` that belongs to the request.
        request: what is run.
        limit: the first so many questions of every task; None: all.
        apply_chat_template: render prompts as a conversation, the examples as its earlier turns.
        key: recorded with the result.
    """
    from lm_eval import evaluate

    started = time.monotonic()
    set_seed(SEED)
    for task in loaded["tasks"].values():
        _set_shots(task, request.num_fewshot)
    # not simple_evaluate: it describes the machine after every task, which takes seconds
    results: Any = evaluate(
        lm,
        loaded,
        limit=limit,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
        bootstrap_iters=1000,
        log_samples=True,
    )
    metrics = _metrics(results["results"].get(request.name, {}), _samples_of(request.name, results))
    if not metrics:  # a tag, or a group that is not averaged: its tasks one by one
        for name in results["samples"]:
            by_task = _metrics(results["results"][name], _samples_of(name, results))
            metrics |= {f"{name} {metric}": figure for metric, figure in by_task.items()}
    if not metrics:
        raise ValueError(f"tasks: expected figures from {request.name!r}, got none. Is it a task that only generates?")
    main = request.main_metric
    questions = {(task, sample["doc_id"]) for task, samples in results["samples"].items() for sample in samples}
    num_truncated = _num_truncated(lm, results["samples"])
    shots = {int(shots) for shots in results["n-shot"].values()} if results.get("n-shot") else set()
    return TaskResult(
        task=request.name,
        metrics=metrics,
        main_metric=main if main in metrics else next(iter(sorted(metrics, key=_preference))),
        num_questions=len(questions),
        num_fewshot=shots.pop() if len(shots) == 1 else request.num_fewshot,
        num_truncated=num_truncated,
        seconds=round(time.monotonic() - started, 1),
        key=key,
        notes=_notes(request, num_truncated),
    )


def _set_shots(task: Any, num_fewshot: int | None) -> None:
    """As lm-eval does it: a task that is defined without examples stays so; examples are the same for every model."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config("num_fewshot", num_fewshot if num_fewshot is not None else own or 0)
    task.set_fewshot_seed(SEED)


def quiet_harness() -> None:
    """lm-eval logs every step of its set-up as a warning; errors remain."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _metrics(figures: dict[str, Any], samples: list[tuple[str, dict[str, Any]]]) -> dict[str, Metric]:
    """lm-eval writes "acc,none": 0.5, "acc_stderr,none": 0.1; the filter none goes without saying."""
    metrics = {}
    for key, value in figures.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = figures.get(f"{metric}_stderr,{filter_name}")
        metrics[metric if filter_name == "none" else key] = Metric(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
            by_question=_by_question(float(value), metric, filter_name, samples),
            higher_is_better=bool((figures.get("higher_is_better") or {}).get(metric, True)),
        )
    return metrics


def _by_question(
    value: float, metric: str, filter_name: str, samples: list[tuple[str, dict[str, Any]]]
) -> dict[str, float] | None:
    """Every question's share in a figure, or None where the figure is not their mean."""
    shares = {
        f"{task} {sample['doc_id']} {sample['doc_hash'][:12]}": float(sample[metric])
        for task, sample in samples
        if sample["filter"] == filter_name and isinstance(sample.get(metric), (int, float, np.number))
    }
    if not shares or not math.isclose(sum(shares.values()) / len(shares), value, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return shares


def _samples_of(name: str, results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The samples of a task, or of all tasks in a group, with the task's name."""
    subtasks = results.get("group_subtasks", {})

    def leaves(task: str) -> Iterable[str]:
        children = subtasks.get(task)
        return [leaf for child in children for leaf in leaves(child)] if children else [task]

    return [(leaf, sample) for leaf in leaves(name) for sample in results["samples"].get(leaf, [])]


def _num_truncated(lm: Any, samples_by_task: dict[str, list[dict[str, Any]]]) -> int:
    """Questions with a prompt that the model's context does not hold; the harness cuts its beginning off."""
    truncated = set()
    for task, samples in samples_by_task.items():
        for sample in samples:
            for arguments in sample["arguments"]:
                context, rest = arguments[0], arguments[1]
                if isinstance(rest, str):  # the context and the choice, whose last token is only predicted
                    too_long = len(lm.tok_encode(context + rest)) - 1 > lm.max_length
                else:  # the context and how to generate
                    room = lm.max_length - int(rest.get("max_gen_toks", lm.max_gen_toks))
                    too_long = len(lm.tok_encode(context)) > room
                if too_long:
                    truncated.add((task, sample["doc_id"]))
                    break
    return len(truncated)


def _notes(request: TaskRequest, num_truncated: int) -> list[str]:
    notes = []
    if num_truncated:
        notes.append(f"{num_truncated} prompts longer than the model's context lost their beginning")
    if request.questions_file is not None and request.examples_file is None and request.num_fewshot:
        notes.append("few-shot examples are other questions of the same file")
    return notes


def _preference(metric: str) -> int:
    """Which of several metrics stands for a task that the leaderboard did not have."""
    order = ["acc_norm", "acc", "exact_match", "f1"]
    name = metric.rpartition(" ")[2].partition(",")[0]
    return order.index(name) if name in order else len(order)
