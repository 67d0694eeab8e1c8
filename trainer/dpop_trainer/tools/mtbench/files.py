"""FastChat's files: question.jsonl in, model_answer/MODEL.jsonl and model_judgment/JUDGE_single.jsonl out.

Source: Zheng et al. 2023, arXiv:2306.05685; the formats are those of lm-sys/FastChat, fastchat/llm_judge.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from dpop_trainer.data.read_json import PlacedRecord, all_records
from dpop_trainer.run_folder.files import write_atomically

# a question in these is graded against a reference answer, where there is one
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")


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
        turns, reference = record.get("turns"), record.get("reference")
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
            raise ValueError(f"{place}: turns: expected a list of texts, got {turns!r:.80}.")
        if "question_id" not in record:
            raise ValueError(f"{place}: question_id: expected a number or a text, got none.")
        questions.append(
            Question(
                question_id=record["question_id"],
                category=str(record.get("category", "")),
                turns=turns,
                reference=reference if isinstance(reference, list) and len(reference) >= len(turns) else None,
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
            answers[record["question_id"]] = record
        except (KeyError, IndexError, TypeError):
            turns = None
        if not (isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)):
            raise ValueError(f"{place}: expected an answer with question_id and choices[0].turns, got {record!r:.80}.")
    return answers


def read_records(path: str | Path, name: str, *, may_end_early: bool = False) -> list[PlacedRecord]:
    """The lines of a JSONL file with their places; a last line cut short by a kill may be left out.

    Raises:
        ValueError: no such file, or a line that is not a JSON object.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{name}: expected a JSONL file, found none at {str(path)!r}.")
    return all_records(path, may_end_early=may_end_early)


def append_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Add lines; after this returns they outlive the process. A line cut short before is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _drop_last_line(file)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Put a complete file in place of what was there."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def _drop_last_line(file: Any) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
