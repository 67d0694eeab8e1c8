"""Pairs from a model's own mistakes: a labelled set against samples that are wrong.

    labels    {"question": "How many clips?", "answer": "48/2 = 24 ...\\n#### 72"}
    samples   {"question": "How many clips?", "sample": "48*2 = 96 ...\\n#### 144"}        (or "samples": [...])

Which samples are wrong says the file itself (`correct_field`) or a matcher. Labels and samples go through the same
normalisation, so that what tells the two sides apart is not how a file was written. The samples are streamed; the
labelled set is held in memory. A sample without a final answer is no mistake to learn from (it may have been cut off):
it is counted and left out, as are right ones.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from dpop_trainer.measure.matchers import MATCHERS, Matcher, Verdict, find_matcher
from dpop_trainer.tools.pairs.metamath import strip_calculator_marks
from dpop_trainer.tools.pairs.recipe import (
    BuiltPair,
    Scaffold,
    SkippedRecord,
    edit_between,
    excerpt,
    field_value,
    text_field,
)
from dpop_trainer.tools.pairs.source import open_source, record_of

ALL_RIGHT = "every sample of the record is right"
NO_ANSWER = "no wrong sample that gives a final answer"
NO_LABEL = "no labelled record with the same key"
LABEL_WITHOUT_ANSWER = "the label gives no final answer to grade against"
SAME_AS_LABEL = "the samples called wrong are the label itself"

_ENOUGH = 0.5  # of the labels a matcher has to read, or it is the wrong one for this file


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
    correct_field: str = field(
        default="", metadata={"help": "true or false for each sample, by the file's own word, in place of a matcher"}
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
        if self.correct_field and (self.answer_regex or self.label_field):
            raise ValueError(
                f"correct_field: expected no --answer_regex and no --label_field beside it, got {self.correct_field!r} "
                "with one. Let the file's own word decide, or a matcher."
            )
        if self.max_per_record < 1:
            raise ValueError(f"max_per_record: expected at least 1, got {self.max_per_record}.")
        if not self.correct_field:
            self._check_labels([entry.label for entry in self._labelled.values()])

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
        labelled = self._labelled.get(_key(record, self.key_field))
        if labelled is None:
            raise SkippedRecord(NO_LABEL)
        samples = _samples(record, self.sample_field)
        verdicts = self._verdicts(record, samples, labelled)
        graded = [(same_format(sample), verdict) for sample, verdict in zip(samples, verdicts, strict=True)]
        # a text that is right once is right, and so is the label; one of nothing but calculator marks is no answer
        right = {text for text, verdict in graded if verdict} | {labelled.chosen, ""}
        rejected = dict.fromkeys(text for text, verdict in graded if verdict is False and text not in right)
        if not rejected:
            raise self._skipped(samples, verdicts)
        return [
            BuiltPair(labelled.question, labelled.chosen, text, edit_between(labelled.chosen, text))
            for text in itertools.islice(rejected, self.max_per_record)
        ]

    def _verdicts(self, record: Mapping[str, Any], samples: list[str], labelled: "_Labelled") -> list[Verdict]:
        if self.correct_field:
            return _verdicts_of_file(record, self.correct_field, len(samples))
        if not self._reads(labelled.label):
            raise SkippedRecord(
                LABEL_WITHOUT_ANSWER,
                f"the label ends {labelled.label[-60:]!r}",
                f"--matcher {self.matcher} looks for {self._matcher.looks_for}",
            )
        return [self._matcher(sample, labelled.label) for sample in samples]

    def _skipped(self, samples: list[str], verdicts: list[Verdict]) -> SkippedRecord:
        if all(verdicts):
            return SkippedRecord(ALL_RIGHT)
        if None not in verdicts:
            return SkippedRecord(SAME_AS_LABEL)
        unread = samples[verdicts.index(None)]
        remedy = f"--matcher {self.matcher} looks for {self._matcher.looks_for}; --answer_regex reads other endings"
        if self.correct_field:
            remedy = f"{self.correct_field} is null there"
        return SkippedRecord(NO_ANSWER, f"a sample ends {unread[-60:]!r}", remedy)

    def _reads(self, label: str) -> bool:
        """Whether a label gives an answer. A whole solution has to hold what a pattern looks for; a field that was
        named for its bare answers may be the answer itself."""
        read = self._matcher.read_sample if self.matcher == "regex" and not self.label_field else None
        return (read or self._matcher.read_label)(label) is not None

    @functools.cached_property
    def _matcher(self) -> Matcher:
        return find_matcher(self.matcher, self.answer_regex)

    @functools.cached_property
    def _labelled(self) -> dict[str, "_Labelled"]:
        labelled: dict[str, _Labelled] = {}
        for item in open_source(self.labels):
            try:
                record = record_of(item)
                key = _key(record, self.key_field)
                answer = text_field(record, self.answer_field)
                label = text_field(record, self.label_field) if self.label_field else answer
                entry = _Labelled(text_field(record, self.question_field), same_format(answer), same_format(label))
            except ValueError as error:
                raise ValueError(f"{item.place}: {error}") from error
            if labelled.setdefault(key, entry)[1:] != entry[1:]:
                raise ValueError(
                    f"{item.place}: {self.key_field}: expected one answer per key, got a second one for "
                    f"{excerpt(key)}. Choose a --key_field that tells the records apart."
                )
        return labelled

    def _check_labels(self, labels: list[str]) -> None:
        """
        Raises:
            ValueError: the matcher reads few of them; with the count and an example.
        """
        unread = [label for label in labels if not self._reads(label)]
        if len(labels) - len(unread) < _ENOUGH * len(labels):
            option = "answer_regex" if self.matcher == "regex" else "matcher"
            raise ValueError(
                f"{option}: expected {self._matcher.looks_for} in the labels, got one in {len(labels) - len(unread):,} "
                f"of {len(labels):,} labels; one without ends {unread[0][-80:]!r}. Give another --matcher or "
                "--answer_regex, name a field with the bare answers (--label_field), or one that says which samples "
                "are right (--correct_field)."
            )


class _Labelled(NamedTuple):
    question: str
    chosen: str
    label: str


def same_format(text: str) -> str:
    """A solution as both sides are written: no calculator marks, one kind of line end, no white space around it."""
    return strip_calculator_marks(text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def _key(record: Mapping[str, Any], field_name: str) -> str:
    value = field_value(record, field_name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(record, field_name).strip()


def _samples(record: Mapping[str, Any], field_name: str) -> list[str]:
    value = field_value(record, field_name)
    if value is None:
        value = record.get("samples")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{field_name}: expected a text or a list of texts, got {excerpt(value)} among the fields "
            f"{sorted(map(str, record))}. Name the field of the samples with --sample_field (one inside another as "
            "outer.inner)."
        )
    return texts


def _verdicts_of_file(record: Mapping[str, Any], field_name: str, num_samples: int) -> list[Verdict]:
    value = field_value(record, field_name)
    values = value if isinstance(value, list) else [value]
    if len(values) != num_samples or not all(item is None or item in (0, 1) for item in values):
        raise ValueError(
            f"{field_name}: expected true or false for each of {num_samples} samples, got {excerpt(value)}."
        )
    return [None if item is None else bool(item) for item in values]
