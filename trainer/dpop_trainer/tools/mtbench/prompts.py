"""What the judge is told: a prompt for the first turn and one for the second, each with and without a reference.

A file of prompts in FastChat's format (judge_prompts.jsonl) can take the place of ours; scores under different prompts
are not comparable, so every judgment carries the name of its prompt.
"""

from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from dpop_trainer.tools.mtbench.files import read_records

_TASK = (
    "You grade the work of an AI assistant. Say in a few sentences what is right and what is wrong or missing in its "
    "{what}: is it correct, does it do what was asked, is it complete and clear? Length alone is no merit. {reference}"
    "End with a whole number from 1 (useless) to 10 (could not be better) in double square brackets, on a line of its "
    "own, like this: Rating: [[5]]"
)
_WITH_REFERENCE = "Hold it against the reference answer, which is right, and name every mistake. "


class JudgePrompt(NamedTuple):
    """One prompt; the template is filled by `str.format`."""

    name: str
    system: str
    template: str


class JudgePrompts(NamedTuple):
    """The four that single-answer grading needs."""

    first: JudgePrompt
    first_reference: JudgePrompt
    second: JudgePrompt
    second_reference: JudgePrompt

    def select(self, turn: int, with_reference: bool) -> JudgePrompt:
        """The prompt for turn 1 or 2."""
        return self[2 * (turn - 1) + int(with_reference)]


_FIELDS = ("question", "answer", "question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2")
# FastChat's names for them
FASTCHAT_NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")

_CONVERSATION = (
    "User, first turn:\n{question_1}\n\nAssistant:\n{answer_1}\n\n"
    "User, second turn:\n{question_2}\n\nAssistant, the answer to grade:\n{answer_2}"
)
_REFERENCES = "Reference answer, first turn:\n{ref_answer_1}\n\nReference answer, second turn:\n{ref_answer_2}\n\n"

OUR_PROMPTS = JudgePrompts(
    first=JudgePrompt(
        "dpop-first-turn",
        _TASK.format(what="answer", reference=""),
        "Question:\n{question}\n\nThe answer to grade:\n{answer}",
    ),
    first_reference=JudgePrompt(
        "dpop-first-turn-reference",
        _TASK.format(what="answer", reference=_WITH_REFERENCE),
        "Question:\n{question}\n\nReference answer:\n{ref_answer_1}\n\nThe answer to grade:\n{answer}",
    ),
    second=JudgePrompt(
        "dpop-second-turn",
        _TASK.format(what="answer to the user's second turn", reference=""),
        _CONVERSATION,
    ),
    second_reference=JudgePrompt(
        "dpop-second-turn-reference",
        _TASK.format(what="answer to the user's second turn", reference=_WITH_REFERENCE),
        _REFERENCES + _CONVERSATION,
    ),
)


def load_prompts(path: str | None) -> JudgePrompts:
    """Ours, or those of a file in FastChat's format.

    Raises:
        ValueError: the file lacks a prompt, or a prompt has a field that is not known.
    """
    if path is None:
        return OUR_PROMPTS
    found = {str(record.get("name")): record for _, record in read_records(path, "prompt_file")}
    missing = [name for name in FASTCHAT_NAMES if name not in found]
    if missing:
        raise ValueError(f"prompt_file: expected the prompts {', '.join(FASTCHAT_NAMES)}, {path!r} lacks {missing}.")
    return JudgePrompts(*(_prompt(name, found[name], Path(path).name) for name in FASTCHAT_NAMES))


def _prompt(name: str, record: dict[str, Any], file: str) -> JudgePrompt:
    """
    Raises:
        ValueError: there is no template, or it has another field than those that are filled, or says how wide one is.
    """
    system, template = record.get("system_prompt", ""), record.get("prompt_template")
    if not isinstance(system, str) or not isinstance(template, str) or not template:
        raise ValueError(f"prompt_file: expected texts in system_prompt and prompt_template of {name!r} in {file}.")
    try:
        for _, field, width, conversion in Formatter().parse(template):
            if field is not None and (field not in _FIELDS or width or conversion):
                raise ValueError(repr(":".join(filter(None, [field, width]))))
    except ValueError as error:
        raise ValueError(
            f"prompt_file: expected fields among {', '.join(_FIELDS)} in {name!r} of {file}, got {error}."
        ) from error
    return JudgePrompt(name, system, template)
