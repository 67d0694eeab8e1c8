"""Pairs from a model's own mistakes: a labelled set against samples that a matcher finds wrong.

    labels    {"question": "How many clips?", "answer": "48/2 = 24 ...\\n#### 72"}
    samples   {"question": "How many clips?", "sample": "48*2 = 96 ...\\n#### 144"}        (or "samples": [...])

The samples are streamed; the labelled set is held in memory. A sample without a final answer is no mistake to learn
from (it may have been cut off): it is counted and left out, as are right ones.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dpop_trainer.measure.matchers import MATCHERS, Verdict, find_matcher
from dpop_trainer.tools.pairs.metamath import strip_calculator_marks
from dpop_trainer.tools.pairs.recipe import BuiltPair, Scaffold, SkippedRecord, edit_between, excerpt, text_field
from dpop_trainer.tools.pairs.source import open_source, record_of

ALL_RIGHT = "every sample of the record is right"
NO_ANSWER = "no wrong sample that gives a final answer"
NO_LABEL = "no labelled record with the same key"


@dataclass(frozen=True)
class FromSamples:
    """A model's samples against a labelled set: wrong ones become rejected answers, the label is chosen."""

    name: ClassVar[str] = "from-samples"
    scaffold: ClassVar[Scaffold] = "question"

    labels: str = field(default="", metadata={"help": "labelled records: a file, as --source; required"})
    key_field: str = field(default="question", metadata={"help": "what sample and label have in common"})
    question_field: str = field(default="question", metadata={"help": "the labelled record's problem"})
    answer_field: str = field(default="answer", metadata={"help": "its solution, which becomes the chosen answer"})
    label_field: str = field(
        default="", metadata={"help": "what samples are graded against; default: the --answer_field itself"}
    )
    sample_field: str = field(
        default="sample", metadata={"help": 'the sample\'s text or list of texts; "samples" is looked for as well'}
    )
    matcher: str = field(
        default="numeric", metadata={"help": "how a sample is graded", "choices": [*MATCHERS, "regex"]}
    )
    answer_regex: str = field(
        default="", metadata={"help": "for --matcher regex: its first group (or whole match) is the answer"}
    )
    max_per_record: int = field(default=4, metadata={"help": "most pairs of one record of samples"})

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("labels: expected a file of labelled records, got none. Pass --labels.")
        find_matcher(self.matcher, self.answer_regex)
        if self.max_per_record < 1:
            raise ValueError(f"max_per_record: expected at least 1, got {self.max_per_record}.")

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
        labelled = self._labelled.get(_key(record, self.key_field))
        if labelled is None:
            raise SkippedRecord(NO_LABEL)
        question, chosen, label = labelled
        samples = list(dict.fromkeys(_samples(record, self.sample_field)))
        verdicts = [self._matches(sample, label) for sample in samples]
        wrong = [sample.strip() for sample, verdict in zip(samples, verdicts, strict=True) if verdict is False]
        wrong = [sample for sample in dict.fromkeys(wrong) if sample != chosen]
        if not wrong:
            raise SkippedRecord(ALL_RIGHT if all(verdicts) else NO_ANSWER)
        return [
            BuiltPair(question, chosen, rejected, edit_between(chosen, rejected))
            for rejected in wrong[: self.max_per_record]
        ]

    @functools.cached_property
    def _matches(self) -> Callable[[str, str], Verdict]:
        return find_matcher(self.matcher, self.answer_regex)

    @functools.cached_property
    def _labelled(self) -> dict[str, tuple[str, str, str]]:
        """Key -> question, chosen answer, label."""
        labelled = {}
        for item in open_source(self.labels):
            try:
                record = record_of(item)
                key = _key(record, self.key_field)
                answer = strip_calculator_marks(text_field(record, self.answer_field)).strip()
                label = text_field(record, self.label_field) if self.label_field else answer
                question = text_field(record, self.question_field)
            except ValueError as error:
                raise ValueError(f"{item.place}: {error}") from error
            if labelled.setdefault(key, (question, answer, label))[1:] != (answer, label):
                raise ValueError(
                    f"{item.place}: {self.key_field}: expected one answer per key, got a second one for "
                    f"{excerpt(key)}. Choose a --key_field that tells the records apart."
                )
        return labelled


def _key(record: Mapping[str, Any], field_name: str) -> str:
    value = record.get(field_name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(record, field_name).strip()


def _samples(record: Mapping[str, Any], field_name: str) -> list[str]:
    value = record[field_name] if field_name in record else record.get("samples")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{field_name}: expected a text or a list of texts, got {excerpt(value)}.")
    return texts
