"""High-edit pairs from multiple-choice questions: the right option against each wrong one.

    prompt     Question: Which technology was developed most recently?\\nAnswer:
    chosen     cellular telephone
    rejected   television

Reads ARC's own form (question, choices.text, choices.label, answerKey) and the prepared one (query, choices, gold).

Source: Pal et al. 2024, arXiv:2402.13228 (the paper's ARC pairs); Clark et al. 2018, arXiv:1803.05457 (the data).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dpop_trainer.tools.pairs.recipe import BuiltPair, Scaffold, SkippedRecord, edit_between, excerpt, text_field

NO_WRONG_OPTION = "no option that differs from the right one"
NO_LABEL = "no label: a test split keeps its answers secret"

_SCAFFOLD = re.compile(r"Question: (?P<question>.*)\nAnswer:", re.DOTALL)  # which `form` puts around a question itself


@dataclass(frozen=True)
class Arc:
    """Multiple-choice questions (question, choices.text, choices.label, answerKey; or query, choices, gold)."""

    name: ClassVar[str] = "arc"
    scaffold: ClassVar[Scaffold] = "question"

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
        if "query" in record:
            query, options, right = read_prepared(record)
            asked = _SCAFFOLD.fullmatch(query)
            return right_against_wrong(asked["question"] if asked else query, options, right)
        question, choices, key = text_field(record, "question"), record.get("choices"), record.get("answerKey")
        texts: Any = choices.get("text") if isinstance(choices, Mapping) else None
        labels: Any = choices.get("label") if isinstance(choices, Mapping) else None
        if not _is_text_list(texts) or not isinstance(labels, list) or len(labels) != len(texts):
            raise ValueError(
                f'choices: expected {{"text": [...], "label": [...]}} of equal lengths, got {excerpt(choices)}.'
            )
        if labels.count(key) != 1:
            raise ValueError(f"answerKey: expected exactly one of choices.label {labels}, got {excerpt(key)}.")
        return right_against_wrong(question, texts, labels.index(key))


def read_prepared(record: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """A question, its options and the index of the right one, as evaluations prepare them (query, choices, gold).

    Raises:
        ValueError: a field cannot be used.
        SkippedRecord: `gold` is empty, as in a test split.
    """
    return text_field(record, "query"), *read_options(record, "choices", "gold")


def read_options(record: Mapping[str, Any], options_field: str, label_field: str) -> tuple[list[str], int]:
    """Options, and the index of the right one.

    Raises:
        ValueError: a field cannot be used.
        SkippedRecord: there is no label.
    """
    options, label = record.get(options_field), record.get(label_field)
    if not _is_text_list(options):
        raise ValueError(f"{options_field}: expected a list of non-empty strings, got {excerpt(options)}.")
    assert isinstance(options, list)
    if label == "":
        raise SkippedRecord(NO_LABEL)
    if isinstance(label, bool) or not str(label).isdecimal() or int(str(label)) >= len(options):
        raise ValueError(
            f"{label_field}: expected the index of one of {len(options)} {options_field}, got {excerpt(label)}."
        )
    return options, int(str(label))


def right_against_wrong(prompt: str, options: list[str], right: int) -> list[BuiltPair]:
    """One pair for each option that is not the right one, in their order. Options equal to an earlier one are one.

    Raises:
        SkippedRecord: no option differs from the right one.
    """
    chosen = options[right]
    wrong = [option for option in dict.fromkeys(options) if option != chosen]
    if not wrong:
        raise SkippedRecord(NO_WRONG_OPTION)
    return [BuiltPair(prompt, chosen, rejected, edit_between(chosen, rejected)) for rejected in wrong]


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)
