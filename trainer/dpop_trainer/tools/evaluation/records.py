"""Results on disk: one JSON file for each model and task, so that a finished one is not run again."""

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpop_trainer.data.source_path import expanded
from dpop_trainer.run_folder.files import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One figure of one model on one task."""

    value: float
    stderr: float | None
    """Standard error over the questions; None where there is none to be had."""
    by_question: dict[str, float] | None
    """The figure of every question by its id, where their mean is the figure: what a paired difference is made of."""
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskResult:
    """One model on one task."""

    task: str
    metrics: dict[str, Metric]
    main_metric: str
    num_questions: int
    num_fewshot: int | None
    num_truncated: int
    """Questions of which a prompt was longer than the model's context: its beginning was cut off."""
    seconds: float
    key: dict[str, Any]
    """What the result depends on: a file with another key is run again."""
    notes: list[str]


def result_path(out: Path, label: str, task: str) -> Path:
    """Where one result lies."""
    return out / _file_name(label) / f"{_file_name(task)}.json"


def read_result(path: Path, key: dict[str, Any], *, whole: bool = True) -> TaskResult | None:
    """A finished result with this key; None where there is none.

    Args:
        path: from `result_path`.
        key: what it must depend on.
        whole: on nothing else.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found, expected = values["key"], json.loads(json.dumps(key))
        if found != expected and (whole or found != {**found, **expected}):
            return None
        metrics = {name: Metric(**metric) for name, metric in values.pop("metrics").items()}
        return TaskResult(metrics=metrics, **values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s: expected a finished result, got what cannot be read (%s). It is run again.", path, error)
        return None


def write_result(path: Path, result: TaskResult) -> None:
    """Keep a result."""
    write_atomically(path, json.dumps(asdict(result), indent=1))


def labels(models: list[str]) -> list[str]:
    """A short name for each model: the last part of its path, with as many parts before it as tell them apart.

    Raises:
        ValueError: the same model twice.
    """
    parts = [_path_parts(model) for model in models]
    if len({tuple(part) for part in parts}) < len(parts):
        raise ValueError(f"models: expected each model once, got {models}.")
    length = 1
    while len({tuple(part[-length:]) for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _path_parts(model: str) -> list[str]:
    parts = [part for part in re.split(r"[/\\]", model) if part not in ("", ".")]
    if not parts or ".." in parts:  # which name nothing by themselves
        parts = [part for part in expanded(model).resolve().parts if part != "/"]
    return parts or ["model"]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text)
