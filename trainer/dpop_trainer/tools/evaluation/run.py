"""`dpop eval`: several models on the same tasks and pairs, resumed where it was stopped, one table at the end."""

import gc
import importlib.util
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from dpop_trainer.models.adapters import adapter_base
from dpop_trainer.models.quantised import as_trained, check_bitsandbytes, compute_dtype, four_bit_config
from dpop_trainer.models.trained import TrainedModel, fingerprint, load_trained, read_run_config
from dpop_trainer.run_folder.contents import read_record
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.run_folder.versions import versions
from dpop_trainer.settings.errors import doing
from dpop_trainer.settings.terminal import say
from dpop_trainer.tools.evaluation import held_out
from dpop_trainer.tools.evaluation.compare import as_markdown, compare
from dpop_trainer.tools.evaluation.records import TaskResult, labels, read_result, result_path, write_result
from dpop_trainer.tools.evaluation.tasks import TaskRequest, load_tasks, parse_tasks

# of the files of results; one of another format is run again
FORMAT = 1


@dataclass(frozen=True)
class EvalSettings:
    """What every model is evaluated with."""

    out: str
    limit: int | None = None
    """The first so many questions of every task and pairs; for a trial only."""
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: str = "8"
    """A number, or "auto": as large as fits (GPU)."""
    max_length: int | None = None
    """Longest input in tokens; None: the model's own limit."""
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    """"auto" spreads a model over all GPUs."""
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    rounded_as: dict[str, Any] = field(default_factory=dict)
    """The configuration of the run whose base in 4 bits all models get; of the first such run among them."""

    def key(self) -> dict[str, Any]:
        """What a result depends on."""
        names = ("limit", "apply_chat_template", "max_length", "dtype", "load_in_4bit")
        key = {name: getattr(self, name) for name in names}
        rounding = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "dtype")
        return key | ({"rounded_as": {name: self.rounded_as.get(name) for name in rounding}} if self.rounded_as else {})


def run_eval(
    models: list[str],
    settings: EvalSettings,
    *,
    tasks: list[str] | None = None,
    local: list[str] | None = None,
    pairs: str | None = None,
    pairs_split: str = "train",
) -> dict[str, Any]:
    """Evaluate every model on every task and on the pairs; a finished result is read, not run again.

    Args:
        models: folders or hub ids of models or adapters. Differences are to the first.
        settings: what all are evaluated with.
        tasks: lm-eval's names, or "open_llm_leaderboard" for the six.
        local: tasks on local files, NAME=FILE.
        pairs: preference pairs that training did not see: a local file or a hub id.
        pairs_split: which split of them.

    Returns:
        The comparison, also written to results.json and results.md in `settings.out`: what was asked for, and what
        earlier calls with the same settings have finished there.

    Raises:
        ValueError: a model, a task or its data cannot be had; said before any model is loaded.
    """
    _check(models, settings)
    if settings.load_in_4bit:
        check_bitsandbytes("load_in_4bit")
        configs = (read_run_config(Path(model)) for model in models)
        settings = replace(settings, rounded_as=next((run for run in configs if run.get("load_in_4bit")), {}))
    requests = parse_tasks(tasks, local, settings.num_fewshot)
    if not requests and pairs is None:
        raise ValueError("tasks: expected something to evaluate on, got nothing. Give --tasks, --local or --pairs.")
    names = labels(models)
    for model in models:
        adapter_base(model)  # a wrong path is said before any data is fetched
    with doing(f"reading the pairs {pairs}"):
        dataset = None if pairs is None else held_out.load_held_out(pairs, pairs_split, settings.limit)
    out = Path(settings.out)
    jobs = [
        _Job(name, model, _plan(model, requests, pairs, dataset, settings), {})
        for name, model in zip(names, models, strict=True)
    ]
    for job in jobs:
        job.find_results(out)
    wanted = [request for request in requests if any(request.name in job.missing() for job in jobs)]
    data = _Data({request.name: request for request in requests}, _load_tasks(wanted), dataset)
    for job in jobs:
        with doing(f"evaluating {job.model}", out):
            _run_job(job, data, settings, out)
    now = {job.name: {task: job.results[task] for task in job.plan} for job in jobs}
    paths = dict(zip(names, models, strict=True))
    earlier = _earlier(out, paths, now, settings)
    shown = [*now, *(name for name in earlier if name not in now)]
    comparison = compare({name: {**now.get(name, {}), **earlier.get(name, {})} for name in shown})
    paths |= {name: model for name, model in _models_of(out).items() if name in shown and name not in paths}
    if settings.limit is not None:
        comparison["notes"].insert(0, f"Trial: the first {settings.limit} questions of every task only.")
    comparison["settings"] = {**settings.key(), "models": paths}
    comparison["versions"] = _versions()
    write_atomically(out / "results.json", json.dumps(comparison, indent=2, ensure_ascii=False))
    write_atomically(out / "results.md", as_markdown(comparison))
    return comparison


def _models_of(out: Path) -> dict[str, str]:
    """The models of the table that an earlier call left, by the names that they have there."""
    try:
        return dict((read_record(out / "results.json") or {})["settings"]["models"])
    except (LookupError, TypeError, ValueError):  # there is none, or one that nobody can read: it is written anew
        return {}


def _earlier(
    out: Path, paths: dict[str, str], now: dict[str, dict[str, TaskResult]], settings: EvalSettings
) -> dict[str, dict[str, TaskResult]]:
    """By model and task, what earlier calls finished in this folder beside what this one was asked for.

    Of the weights as they are, with the same settings, on the same questions.
    """
    found: dict[str, dict[str, TaskResult]] = {}
    sources = {task: result.key.get("source") for results in now.values() for task, result in results.items()}
    for name, model in {**paths, **_models_of(out)}.items():
        weights = _weights_key(paths.get(name, model), settings)
        for path in sorted(result_path(out, name, "").parent.glob("*.json")):
            result = read_result(path, weights, whole=False)
            if result is None or result.task in now.get(name, {}):
                continue
            if sources.setdefault(result.task, result.key.get("source")) == result.key.get("source"):
                found.setdefault(name, {})[result.task] = result
    return found


def _weights_key(model: str, settings: EvalSettings) -> dict[str, Any]:
    """What every result of a model depends on."""
    return {"format": FORMAT, "model": fingerprint(model), **settings.key()}


class _Data(NamedTuple):
    """What models are evaluated on."""

    requests: dict[str, TaskRequest]
    tasks: dict[str, Any]
    pairs: Dataset | None


class _Job(NamedTuple):
    """One model: what it is to be run on, with all that the results depend on, and the results so far."""

    name: str
    model: str
    plan: dict[str, dict[str, Any]]
    results: dict[str, TaskResult]

    def find_results(self, out: Path) -> None:
        """Take up what an earlier run finished."""
        for task, key in self.plan.items():
            found = read_result(result_path(out, self.name, task), key)
            if found is not None:
                self.results[task] = found

    def missing(self) -> list[str]:
        return [task for task in self.plan if task not in self.results]


def _run_job(job: _Job, data: _Data, settings: EvalSettings, out: Path) -> None:
    """Run what is missing; each result is kept as soon as it is there."""
    missing, num_done = job.missing(), len(job.results)
    say(f"{job.name}: {num_done} of {len(job.plan)} done before{'' if missing else ': nothing to do'}.")
    if not missing:
        return
    with doing(f"loading {job.model}"):
        trained = _load(job.model, settings)
    lm = None
    for number, task in enumerate(missing, num_done + 1):
        say(f"{job.name}: {task} ({number} of {len(job.plan)})")
        if task == held_out.TASK:
            assert data.pairs is not None
            result = held_out.score_pairs(
                trained,
                data.pairs,
                batch_size=8 if settings.batch_size == "auto" else int(settings.batch_size),
                max_length=settings.max_length or _context_length(trained.model),
            )
            result = replace(result, key=job.plan[task])
        else:
            from dpop_trainer.tools.evaluation.harness import harness_model, run_task

            lm = lm or harness_model(trained, batch_size=settings.batch_size, max_length=settings.max_length)
            result = run_task(
                lm,
                data.tasks[task],
                data.requests[task],
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                key=job.plan[task],
            )
        write_result(result_path(out, job.name, task), result)
        job.results[task] = result
    del lm, trained  # before the next model is loaded
    _release()


def _plan(
    model: str, requests: list[TaskRequest], pairs: str | None, dataset: Dataset | None, settings: EvalSettings
) -> dict[str, dict[str, Any]]:
    """What is to be run on a model, each with all that its result depends on."""
    weights = _weights_key(model, settings)
    harness = {"lm-eval": _versions().get("lm-eval")}  # its prompts change from one version to the next
    plan = {
        request.name: {**weights, **harness, "num_fewshot": request.num_fewshot, "source": request.source}
        for request in requests
    }
    if dataset is not None:
        assert pairs is not None
        plan[held_out.TASK] = {**weights, "source": held_out.pairs_source(pairs, dataset)}
    return plan


def _check(models: list[str], settings: EvalSettings) -> None:
    if not models:
        raise ValueError("models: expected at least one folder or hub id, got none.")
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit: expected at least 1 question, got {settings.limit}.")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise ValueError(f"num_fewshot: expected at least 0 examples, got {settings.num_fewshot}.")
    if settings.batch_size != "auto" and not re.fullmatch("0*[1-9][0-9]{0,8}", settings.batch_size):
        raise ValueError(f"batch_size: expected a number from 1 or 'auto', got {settings.batch_size!r}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"expected one process, got WORLD_SIZE {os.environ['WORLD_SIZE']}. Start `dpop eval` without a launcher; "
            "--device_map auto spreads a large model over the GPUs."
        )


def _load_tasks(requests: list[TaskRequest]) -> dict[str, Any]:
    if not requests:
        return {}
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks: expected lm-eval for {', '.join(request.name for request in requests)}, found it not installed. "
            "Run: pip install 'dpop-kernels[eval]'. (--pairs alone needs nothing more.)"
        )
    from dpop_trainer.tools.evaluation.harness import quiet_harness

    quiet_harness()
    say(f"Loading the data of {', '.join(request.name for request in requests)}")
    return load_tasks(requests)


def _load(model: str, settings: EvalSettings) -> TrainedModel:
    init_kwargs = {
        "dtype": settings.dtype,
        "device_map": settings.device_map,
        "trust_remote_code": settings.trust_remote_code or None,
    }
    quantization_config = None
    if settings.load_in_4bit:
        # what an adapter was trained on, to the last scale; all others alike
        quantization_config = as_trained(settings.rounded_as) or four_bit_config(
            compute_dtype(settings.dtype or "auto")
        )
    return load_trained(
        model,
        init_kwargs={name: value for name, value in init_kwargs.items() if value is not None},
        quantization_config=quantization_config,
        device=settings.device,
    )


def _context_length(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _versions() -> dict[str, str]:
    found = versions()
    if importlib.util.find_spec("lm_eval") is not None:
        from importlib.metadata import version

        found["lm-eval"] = version("lm-eval")
    return found
