"""FastChat's files: question.jsonl in, model_answer/MODEL.jsonl and model_judgment/JUDGE_single.jsonl out.

Source: Zheng et al. 2023, arXiv:2306.05685; the formats are those of lm-sys/FastChat, fastchat/llm_judge.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from dpop_trainer.data.read_json import PlacedRecord, all_records
from dpop_trainer.data.source_path import expanded
from dpop_trainer.run_folder.files import append_lines, flush, write_atomically

# a question in these is graded against a reference answer, where there is one
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
NO_SCORE = -1
"""FastChat's mark of a judgment without a rating, which it leaves out of means."""


class Question(NamedTuple):
    """One conversation to hold."""

    question_id: int | str
    category: str
    turns: list[str]
    reference: list[str] | None
    """A right answer to each turn."""


def read_questions(path: str | Path) -> list[Question]:
    """The questions, in the file's order.

    Raises:
        ValueError: no such file, or a line that is not a question (it is named).
    """
    questions = []
    for place, record in read_records(path, "questions"):
        turns, reference, category = record.get("turns"), record.get("reference"), record.get("category", "")
        if not (turns and _are_texts(turns)):
            raise ValueError(f"{place}: turns: expected a list of texts, got {turns!r:.80}.")
        if not _is_id(record.get("question_id")):
            got = f"{record['question_id']!r:.80}" if "question_id" in record else "none"
            raise ValueError(f"{place}: question_id: expected a whole number or a text, got {got}.")
        if not isinstance(category, str):
            raise ValueError(f"{place}: category: expected a text, got {category!r:.80}.")
        if reference is not None and not _are_texts(reference):
            raise ValueError(f"{place}: reference: expected a list of texts, one to each turn, got {reference!r:.80}.")
        questions.append(
            Question(
                question_id=record["question_id"],
                category=category,
                turns=turns,
                reference=reference if reference is not None and len(reference) >= len(turns) else None,
            )
        )
    repeated = len(questions) - len({question.question_id for question in questions})
    if not questions or repeated:
        raise ValueError(
            f"questions: expected at least one question and each question_id once in {str(path)!r}, got "
            f"{len(questions)} questions and {repeated} repeated ids."
        )
    return questions


def read_references(path: str | Path) -> dict[int | str, list[str]]:
    """Right answers by question, from a file in the format of answers, as FastChat's reference_answer/gpt-4.jsonl.

    Raises:
        ValueError: no such file, or a line that is not an answer.
    """
    return {question_id: answer["choices"][0]["turns"] for question_id, answer in read_answers(path).items()}


def read_answers(path: str | Path) -> dict[int | str, dict[str, Any]]:
    """A model's answers by question; of two to one question the later.

    Raises:
        ValueError: no such file, or a line that is not an answer.
    """
    answers = {}
    for place, record in read_records(path, "answers", may_end_early=True):
        try:
            turns = record["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            turns = None
        if not (_are_texts(turns, or_halves=True) and _is_id(record.get("question_id"))):
            raise ValueError(f"{place}: expected an answer with question_id and choices[0].turns, got {record!r:.80}.")
        answers[record["question_id"]] = record
    return answers


def read_judgments(path: str | Path) -> list[dict[str, Any]]:
    """Judgments as FastChat writes them, those without a rating among them.

    Raises:
        ValueError: no such file, or a line that is not a judgment.
    """
    judgments = []
    for place, record in read_records(path, "judgments", may_end_early=True):
        judge, score = record.get("judge"), record.get("score")
        is_one = (
            _is_id(record.get("question_id"))
            and _are_texts([record.get("model"), record.get("user_prompt")], or_halves=True)
            and _are_texts(judge, or_halves=True)
            and len(judge or ()) == 2
            and record.get("turn") in (1, 2)
            and isinstance(score, int | float)
            and not isinstance(score, bool)
            and (score == NO_SCORE or 1 <= score <= 10)
        )
        if not is_one:
            raise ValueError(
                f"{place}: expected a judgment with model, question_id, turn, judge (its name and its prompt's), "
                f"user_prompt and a score, got {record!r:.80}. Remove the line: it is then asked for again."
            )
        judgments.append(record)
    return judgments


def read_records(path: str | Path, name: str, *, may_end_early: bool = False) -> list[PlacedRecord]:
    """The lines of a JSONL file with their places; a last line cut short by a kill may be left out.

    Raises:
        ValueError: no such file, or a line that is not a JSON object.
    """
    path = expanded(path)
    if not path.is_file():
        raise ValueError(f"{name}: expected a JSONL file, found none at {str(path)!r}.")
    return all_records(path, may_end_early=may_end_early)


def append_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Add lines; after this returns they outlive the process. A line cut short before is taken off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_lines(path, "".join(json.dumps(record) + "\n" for record in records))
    flush(path)


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Put a complete file in place of what was there."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _are_texts(value: Any, *, or_halves: bool = False) -> bool:
    """A list of texts, which no tokenizer takes with half of a surrogate pair in them."""
    if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        return False
    return or_halves or not any("\ud800" <= sign <= "\udfff" for text in value for sign in text)
