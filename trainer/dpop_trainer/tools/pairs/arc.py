"""High-edit pairs from multiple-choice questions: the right option against each wrong one.

    prompt     Question: Which technology was developed most recently?\\nAnswer:
    chosen     cellular telephone
    rejected   television

Source: Pal et al. 2024, arXiv:2402.13228 (the paper's ARC pairs); Clark et al. 2018, arXiv:1803.05457 (the data).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dpop_trainer.tools.pairs.recipe import BuiltPair, Scaffold, SkippedRecord, edit_between, excerpt, text_field

NO_WRONG_OPTION = "no option that differs from the right one"


@dataclass(frozen=True)
class Arc:
    """Multiple-choice questions as ARC has them (question, choices.text, choices.label, answerKey)."""

    name: ClassVar[str] = "arc"
    scaffold: ClassVar[Scaffold] = "question"

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
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
