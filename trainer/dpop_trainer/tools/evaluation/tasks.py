"""Which tasks are run: the Open LLM Leaderboard's six with their shots, any other of lm-eval's, or local files.

A local task is lm-eval's own task with its data replaced: prompt, choices, metric and filters stay the harness's.
"""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpop_trainer.data.source_path import expanded


class KnownTask(NamedTuple):
    """A task of the first Open LLM Leaderboard."""

    num_fewshot: int
    metric: str
    """The metric that the leaderboard showed, by lm-eval's name."""
    folder: str
    """Where lm-eval keeps it: reading one folder takes a hundredth of the time of its whole index."""
    columns: tuple[str, ...]
    """What the task reads of a question, as it is published."""
    prepared: tuple[str, ...] = ()
    """What it reads after its own preparation, which a file may be written after."""


_PREPARED = ("query", "choices", "gold")
LEADERBOARD = {
    "arc_challenge": KnownTask(25, "acc_norm", "arc", ("question", "choices", "answerKey")),
    "hellaswag": KnownTask(
        10, "acc_norm", "hellaswag", ("ctx_a", "ctx_b", "activity_label", "endings", "label"), _PREPARED
    ),
    "mmlu": KnownTask(5, "acc", "mmlu", ("question", "choices", "answer")),
    "truthfulqa_mc2": KnownTask(0, "acc", "truthfulqa", ("question", "mc2_targets")),
    "winogrande": KnownTask(5, "acc", "winogrande", ("sentence", "option1", "option2", "answer")),
    "gsm8k": KnownTask(5, "exact_match,strict-match", "gsm8k", ("question", "answer")),
}
SUITE = "open_llm_leaderboard"
ALIASES = {"arc": "arc_challenge", "truthfulqa": "truthfulqa_mc2"}

# names of the splits that a local file is made into
QUESTIONS, EXAMPLES = "questions", "examples"


@dataclass(frozen=True)
class TaskRequest:
    """One task to run."""

    name: str
    """lm-eval's name."""
    num_fewshot: int | None
    """None: what lm-eval's configuration says."""
    questions_file: str | None = None
    """A local file in place of the hub's data."""
    examples_file: str | None = None
    """Where the few-shot examples come from; None: from the questions, never the one that is asked."""

    @property
    def main_metric(self) -> str | None:
        """The leaderboard's metric, where it had this task."""
        return LEADERBOARD[self.name].metric if self.name in LEADERBOARD else None

    @property
    def source(self) -> str:
        """What the questions and examples are, so that a result is not mistaken for that of other data."""
        if self.questions_file is None:
            return "hub"
        files = [file for file in (self.questions_file, self.examples_file) if file]
        return " + ".join(f"{Path(file).name} {_file_hash(file)}" for file in files)


def parse_tasks(tasks: list[str] | None, local: list[str] | None, num_fewshot: int | None) -> list[TaskRequest]:
    """From the command line's names to requests.

    Args:
        tasks: lm-eval's names, or "open_llm_leaderboard" for the six.
        local: "NAME=FILE" replaces a task's questions, "NAME.examples=FILE" its few-shot examples.
        num_fewshot: overrides the shots of every task but those that are defined without any.

    Raises:
        ValueError: a local task that is not NAME=FILE, a file that does not exist, or a task asked for twice.
    """
    names: list[str] = []
    for name in tasks or []:
        names += list(LEADERBOARD) if name == SUITE else [ALIASES.get(name, name)]
    files: dict[str, str] = {}
    for item in local or []:
        name, _, file = item.partition("=")
        if not name or not file:
            raise ValueError(f"local: expected NAME=FILE, got {item!r}. For example arc=ARC-Challenge_validation.jsonl")
        if not expanded(file).is_file():
            raise ValueError(f"local: expected a file of questions for {name}, found none at {file!r}.")
        name, _, part = name.partition(".")
        if part not in ("", EXAMPLES):
            raise ValueError(f"local: expected NAME=FILE or NAME.{EXAMPLES}=FILE, got {item!r}.")
        key = ALIASES.get(name, name) + (f".{EXAMPLES}" if part else "")
        if key in files:
            raise ValueError(f"local: expected one file for {key}, got {files[key]!r} and {file!r}.")
        files[key] = str(expanded(file))
    local_names = [key for key in files if not key.endswith(f".{EXAMPLES}")]
    for key in files:
        if key.removesuffix(f".{EXAMPLES}") not in local_names:
            raise ValueError(f"local: expected the questions of {key} too, got its examples alone.")
    repeated = {name for name in names + local_names if (names + local_names).count(name) > 1}
    if repeated:
        raise ValueError(f"tasks, local: expected each task once, got {sorted(repeated)} more than once.")
    return [
        TaskRequest(
            name=name,
            num_fewshot=_num_fewshot(name, num_fewshot),
            questions_file=files.get(name),
            examples_file=files.get(f"{name}.{EXAMPLES}"),
        )
        for name in names + local_names
    ]


def load_tasks(requests: list[TaskRequest]) -> dict[str, Any]:
    """The tasks with their data, as `lm_eval.evaluate` takes them: before any model is loaded.

    Returns:
        By request name, what `TaskManager.load` returns: "tasks" and, of a group, "groups".

    Raises:
        ValueError: a name that lm-eval does not know (the closest are named), or data that can be had neither from the
            hub nor from its cache.
    """
    from lm_eval.tasks import TaskManager

    manager: Any = TaskManager(**_where_to_look(requests))
    return {request.name: _load_task(request, manager) for request in requests}


def _load_task(request: TaskRequest, manager: Any) -> Any:
    if request.name not in manager.all_tasks:
        close = difflib.get_close_matches(request.name, [*manager.all_tasks, SUITE], n=3)
        hint = f"Did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them."
        raise ValueError(f"tasks: expected names that lm-eval knows, got {request.name!r}. {hint}")
    example = request.name if request.name in manager.all_subtasks else "NAME"  # a group has no questions of its own
    splits = _local_splits(request, manager)
    spec: Any = _local_spec(request, splits) if splits else request.name
    try:
        loaded = manager.load([spec])
    # the hub, its cache, the network and the reading of a file fail in a dozen classes without a common ancestor
    except Exception as error:
        raise ValueError(
            f"tasks: expected the data of {request.name!r} from {_named_source(request)}, could not load it "
            f"({type(error).__name__}: {_first_line(error)}). {_way_out(example, splits)}"
        ) from error
    # the group that a local task is loaded through has no figure of its own
    return loaded if request.questions_file is None else {"tasks": loaded["tasks"]}


def _local_splits(request: TaskRequest, manager: Any) -> dict[str, Any]:
    """The questions and examples of the files, by split; none for a task on the hub's data.

    Raises:
        ValueError: the task is a group, or a file lacks what the task reads.
    """
    from dpop_trainer.data import load_pairs

    if request.questions_file is None:
        return {}
    if request.name not in manager.all_subtasks:
        raise ValueError(
            f"local: expected a single task, got the group {request.name!r}. Give a file for each of its tasks."
        )
    files = {QUESTIONS: request.questions_file, EXAMPLES: request.examples_file}
    splits = {split: load_pairs(file) for split, file in files.items() if file is not None}
    for split, dataset in splits.items():
        _check_columns(request.name, str(files[split]), dataset.column_names)
    return splits


def _check_columns(name: str, file: str, found: list[str]) -> None:
    """Of a task whose columns are known. Others fail in lm-eval, which knows no more than the first that is missing."""
    known = LEADERBOARD.get(name)
    if known is None:
        return
    forms = [form for form in (known.columns, known.prepared) if form]
    if any(set(form) <= set(found) for form in forms):
        return
    expected = " or ".join(", ".join(form) for form in forms)
    raise ValueError(
        f"local: expected a file for {name} with the columns {expected}, got {file!r} with {', '.join(found)}. Give "
        "them the names that they have in the published data set."
    )


def _local_spec(request: TaskRequest, splits: dict[str, Any]) -> dict[str, Any]:
    """The task as lm-eval configures it, with the data of the files."""
    task: dict[str, Any] = {
        "task": request.name,
        "custom_dataset": lambda **_: splits,
        "dataset_kwargs": {},
        "training_split": None,
        "validation_split": None,
        "test_split": QUESTIONS,
        "fewshot_split": EXAMPLES if request.examples_file else QUESTIONS,
    }
    # the harness prepares raw HellaSwag itself; a file written after that step has its columns already
    prepared = {set(_PREPARED) <= set(split.column_names) for split in splits.values()}
    if request.name == "hellaswag" and True in prepared:
        if False in prepared:
            raise ValueError(
                f"local: expected the questions and examples of hellaswag in one form, got {request.questions_file!r} "
                f"and {request.examples_file!r}, one with the columns query, choices, gold and one raw."
            )
        task |= {"process_docs": None, "doc_to_target": "{{gold}}"}
    # as a member of a group, a dict overrides the registered task; alone it would be a task of its own
    return {"group": f"{request.name}, local", "task": [task]}


def _way_out(example: str, splits: dict[str, Any]) -> str:
    if splits:
        found = ", ".join(dict.fromkeys(name for split in splits.values() for name in split.column_names))
        return f"The file's columns are: {found}. Give them the names that they have in the published data set."
    return (
        "Connect to the hub once (its cache serves later runs), or give the questions as a file: "
        f"--local {example}=FILE."
    )


def _where_to_look(requests: list[TaskRequest]) -> dict[str, Any]:
    import lm_eval.tasks

    if not all(request.name in LEADERBOARD for request in requests):
        return {}
    folder = Path(lm_eval.tasks.__file__).parent
    paths = [str(folder / LEADERBOARD[request.name].folder) for request in requests]
    return {"include_defaults": False, "include_path": paths}


def _num_fewshot(name: str, override: int | None) -> int | None:
    known = LEADERBOARD.get(name)
    if known is not None and (override is None or known.num_fewshot == 0):
        return known.num_fewshot
    return override


def _named_source(request: TaskRequest) -> str:
    return repr(request.questions_file) if request.questions_file else "the hub or its local cache"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _file_hash(file: str) -> str:
    return hashlib.sha256(expanded(file).read_bytes()).hexdigest()[:12]
