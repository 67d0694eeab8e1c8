"""Grades for answers: each turn on its own, from 1 to 10, by a judge model; every judgment is kept as it comes."""

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from dpop_trainer.report.markdown import plain, table
from dpop_trainer.report.terminal import PLAIN, Terminal
from dpop_trainer.run_folder.files import write_atomically
from dpop_trainer.settings.terminal import printable, say
from dpop_trainer.tools.mtbench.endpoint import Endpoint, EndpointError, JudgeError
from dpop_trainer.tools.mtbench.files import (
    NO_SCORE,
    REFERENCE_CATEGORIES,
    Question,
    append_records,
    read_answers,
    read_judgments,
    read_questions,
    read_references,
    write_records,
)
from dpop_trainer.tools.mtbench.prompts import JudgePrompt, JudgePrompts, load_prompts

# the last one counts: judges think aloud before they decide
RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")


class Judging(NamedTuple):
    """One grade to be had."""

    model: str
    question: Question
    turn: int
    prompt: JudgePrompt
    user_prompt: str

    def key(self, judge_model: str) -> tuple[Any, ...]:
        """What makes a judgment the same: who, what, by whom, and the very text that was judged."""
        return (self.model, self.question.question_id, self.turn, judge_model, self.prompt.name, self.user_prompt)


@dataclass(frozen=True)
class JudgeReport:
    """What came of a run."""

    scores: dict[str, Any]
    failures: list[str]
    """Judgments that are still missing, with the reason; the next run asks for them again."""


def rating_of(judgment: str) -> float | None:
    """The number in double brackets, from 1 to 10; None where there is none."""
    found = RATING.findall(judgment)
    rating = float(found[-1]) if found else None
    return rating if rating is not None and 1 <= rating <= 10 else None


def run_judge(
    *,
    questions: str,
    out: str,
    models: list[str] | None,
    endpoint: Endpoint,
    prompt_file: str | None = None,
    reference_file: str | None = None,
    workers: int = 4,
    first_turn_only: bool = False,
) -> JudgeReport:
    """Grade the answers in OUT/model_answer; judgments go to OUT/model_judgment/JUDGE_single.jsonl as they come.

    A judgment that is there is not asked for again, unless it has no rating or the answer has changed.

    Args:
        questions: FastChat's question.jsonl.
        out: the folder of `run_answer`.
        models: whose answers; None: of every file in OUT/model_answer.
        endpoint: the judge.
        prompt_file: prompts in FastChat's format, in place of ours.
        reference_file: right answers, in the format of answers; else those of the questions themselves.
        workers: requests at a time.
        first_turn_only: leave the second turn out.

    Raises:
        ValueError: a file is missing or cannot be used.
        EndpointError: the endpoint refuses every request. What was judged before is kept.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1 request at a time, got {workers}.")
    asked, prompts = read_questions(questions), load_prompts(prompt_file)
    references = read_references(reference_file) if reference_file else {}
    asked = [
        question._replace(reference=references.get(question.question_id, question.reference)) for question in asked
    ]
    folder = Path(out) / "model_answer"
    names = models or sorted(file.stem for file in folder.glob("*.jsonl"))
    if not names:
        raise ValueError(f"models: expected answers in {str(folder)!r}, found none. Run `dpop mtbench answer` first.")
    wanted, unanswered = [], 0
    for name in names:
        answers = read_answers(folder / f"{name}.jsonl")
        for question in asked:
            answer = answers.get(question.question_id)
            if answer is None:
                unanswered += 1
                continue
            wanted += _judgings(name, question, answer["choices"][0]["turns"], prompts, first_turn_only)
    path = Path(out) / "model_judgment" / f"{file_stem(endpoint.model)}_single.jsonl"
    kept = _kept(path)
    missing = [judging for judging in wanted if judging.key(endpoint.model) not in kept]
    without = sum(q.category in REFERENCE_CATEGORIES and q.reference is None for q in asked)
    if without:
        say(f"{without} questions on {', '.join(REFERENCE_CATEGORIES)} have no reference answer: graded without.")
    if unanswered:
        say(f"{unanswered} questions have no answer and are left out.")
    say(f"{len(wanted)} judgments, {len(wanted) - len(missing)} made before.")
    failures = _ask(missing, endpoint, path, workers) if missing else []
    kept = _kept(path)
    scores = _scores(wanted, kept, endpoint.model)
    if failures:
        scores["notes"].append(f"{len(failures)} of {len(wanted)} judgments are missing.")
    stem = file_stem(endpoint.model)
    write_atomically(Path(out) / f"scores_{stem}.json", json.dumps(scores, indent=2, ensure_ascii=False))
    write_atomically(Path(out) / f"scores_{stem}.md", scores_as_markdown(scores))
    return JudgeReport(scores, failures)


def file_stem(judge_model: str) -> str:
    """A judge's name as part of a file's."""
    return re.sub(r"[^0-9A-Za-z._-]+", "_", judge_model)


def scores_as_markdown(scores: dict[str, Any]) -> str:
    """Mean scores by model and category."""
    titles, *rows = _table(scores)
    text = f"# {_title(scores, plain)}\n\n{table(titles, rows)}\n\n{_legend(scores, plain)}"
    return text + "".join(f"\n\n{note}" for note in scores["notes"]) + "\n"


def scores_as_text(scores: dict[str, Any], terminal: Terminal = PLAIN) -> str:
    """The same for a terminal."""
    told = (terminal.filled(text) for text in (_legend(scores), *scores["notes"]))
    return "\n\n".join([_title(scores), terminal.table(_table(scores)), *told])


def _title(scores: dict[str, Any], shown: Callable[[str], str] = str) -> str:
    return f"MT-Bench, judged by {shown(scores['judge'])}"


def _legend(scores: dict[str, Any], shown: Callable[[str], str] = str) -> str:
    prompts = shown(", ".join(scores["prompts"]))
    return f"Mean grade from 1 to 10 ± one standard error (number of grades). Prompts: {prompts}."


def _table(scores: dict[str, Any]) -> list[list[str]]:
    """Titles, then a row per model."""
    categories = list(dict.fromkeys(name for model in scores["models"].values() for name in model["categories"]))
    lines = [["model", "first turn", "second turn", "both", *categories]]
    for name, model in scores["models"].items():
        cells = [_cell(model[part]) for part in ("first_turn", "second_turn", "both")]
        lines.append([name, *cells, *(_cell(model["categories"].get(category)) for category in categories)])
    return lines


def _judgings(
    model: str, question: Question, turns: list[str], prompts: JudgePrompts, first_turn_only: bool
) -> list[Judging]:
    reference = question.reference if question.category in REFERENCE_CATEGORIES else None
    fields = {"question": question.turns[0], "answer": turns[0] if turns else ""}
    for number in range(2):
        fields[f"question_{number + 1}"] = question.turns[number] if number < len(question.turns) else ""
        fields[f"answer_{number + 1}"] = turns[number] if number < len(turns) else ""
        fields[f"ref_answer_{number + 1}"] = reference[number] if reference and number < len(reference) else ""
    num_turns = min(1 if first_turn_only else 2, len(question.turns), len(turns))
    judgings = []
    for turn in range(1, num_turns + 1):
        prompt = prompts.select(turn, reference is not None and len(reference) >= turn)
        judgings.append(Judging(model, question, turn, prompt, prompt.template.format(**fields)))
    return judgings


def _ask(missing: list[Judging], endpoint: Endpoint, path: Path, workers: int) -> list[str]:
    """Ask for all; whoever gets a reply writes it down at once, so that no stop loses one -> failures."""
    failures: list[str] = []
    stop, writing = threading.Event(), threading.Lock()
    num_replies = 0

    def ask(judging: Judging) -> str | None:
        if stop.is_set():
            return None
        messages = [{"role": "system", "content": judging.prompt.system}] if judging.prompt.system else []
        messages.append({"role": "user", "content": judging.user_prompt})
        try:
            judgment = endpoint.chat(messages, stop=stop)
        except EndpointError:
            stop.set()
            raise
        with writing:
            append_records(path, [_record(judging, endpoint.model, judgment)])
        return judgment

    def named(judging: Judging) -> str:
        return f"{judging.model}, question {judging.question.question_id}, turn {judging.turn}"

    with (
        ThreadPoolExecutor(max_workers=workers) as pool,
        tqdm(total=len(missing), desc=printable(endpoint.model), unit="judgment") as bar,
    ):
        futures = {pool.submit(ask, judging): judging for judging in missing}
        try:
            for future in as_completed(futures):
                judging = futures[future]
                bar.update()
                try:
                    judgment = future.result()
                except JudgeError as error:
                    failures.append(f"{named(judging)}: {error}")
                    # an endpoint that never replied is asked no more: each request would be waited for in vain
                    if num_replies == 0 and len(failures) >= 3:
                        raise EndpointError(
                            f"endpoint: expected replies from {endpoint.url!r}, the first {len(failures)} requests got "
                            f"none. The last: {error}."
                        ) from error
                    continue
                num_replies += 1
                if judgment is not None and rating_of(judgment) is None:
                    failures.append(f"{named(judging)}: no rating from 1 to 10 in {judgment[:80]!r}")
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return failures


def _record(judging: Judging, judge_model: str, judgment: str) -> dict[str, Any]:
    rating = rating_of(judgment)
    return {
        "question_id": judging.question.question_id,
        "model": judging.model,
        "judge": [judge_model, judging.prompt.name],
        "user_prompt": judging.user_prompt,
        "judgment": judgment,
        "score": NO_SCORE if rating is None else rating,
        "turn": judging.turn,
        "tstamp": time.time(),
    }


def _kept(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The judgments with a rating. Those without are asked for again, and dropped once there is a better one."""
    if not path.exists():
        return {}
    records = {}
    for record in read_judgments(path):
        judge_model, prompt = record["judge"]
        key = (record["model"], record["question_id"], record["turn"], judge_model, prompt, record["user_prompt"])
        if key not in records or record["score"] != NO_SCORE:
            records[key] = record
    write_records(path, list(records.values()))
    return {key: record for key, record in records.items() if record["score"] != NO_SCORE}


def _scores(wanted: list[Judging], kept: dict[tuple[Any, ...], dict[str, Any]], judge_model: str) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for name in dict.fromkeys(judging.model for judging in wanted):
        graded = [
            (judging, kept[judging.key(judge_model)]["score"])
            for judging in wanted
            if judging.model == name and judging.key(judge_model) in kept
        ]
        categories = sorted({judging.question.category for judging, _ in graded})
        models[name] = {
            "first_turn": _mean([score for judging, score in graded if judging.turn == 1]),
            "second_turn": _mean([score for judging, score in graded if judging.turn == 2]),
            "both": _mean([score for _, score in graded]),
            "categories": {
                category: _mean([score for judging, score in graded if judging.question.category == category])
                for category in categories
            },
        }
    prompts = sorted({judging.prompt.name for judging in wanted})
    return {"judge": judge_model, "prompts": prompts, "models": models, "notes": []}


def _mean(scores: list[float]) -> dict[str, Any] | None:
    if not scores:
        return None
    values = np.array(scores, dtype=np.float64)
    stderr = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "stderr": stderr, "num_grades": len(values)}


def _cell(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return "–"
    error = "" if mean["stderr"] is None else f" ± {mean['stderr']:.2f}"
    return f"{mean['value']:.2f}{error} ({mean['num_grades']})"
