"""Low-edit pairs from worked solutions: the rejected answer is the chosen one with one intermediate result wrong.

    chosen     She sold 48/2 = 24 clips in May.\\nTogether that is 48+24 = 72 clips.\\n#### 72
    rejected   She sold 48/2 = 26 clips in May.\\nTogether that is 48+24 = 72 clips.\\n#### 72

Everything after the wrong number stays as it was, the final answer too. Such pairs are where plain DPO lowers the
chosen answer: its tokens after the edit are the rejected answer's tokens as well.

Works on MetaMath, GSM8K and anything else that writes its steps as equations and its final answer after "####" or a
phrase of `announced`, in digits of any script.

Source: Pal et al. 2024, arXiv:2402.13228 (the paper's MetaMath pairs).
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from dpop_trainer.measure.announced import PHRASES
from dpop_trainer.measure.numerals import change_one_digit, in_ascii
from dpop_trainer.tools.pairs.counts import PairCounts
from dpop_trainer.tools.pairs.form import format_completion, format_prompt
from dpop_trainer.tools.pairs.protected import CALCULATOR_MARK, outside_protected
from dpop_trainer.tools.pairs.recipe import BuiltPair, Edit, Scaffold, SkippedRecord, record_rng, text_field

# "= 12", "= $1,250.50", "= -3", "= .5": only the number itself is in the group, so sign and currency stay
_RESULT = re.compile(
    r"= *-?[$€£¥₹₩]? ?-?(?P<number>(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3})(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
# What follows a number that is not a result but part of something longer.
_GOES_ON = re.compile(
    r"""  [\d.,:]*\d                      # 1,00000   3:15
        | [A-Za-z_](?![A-Za-z])           # 3x, but not 3km
        | [ ]*\((?![^\x00-\x7f])          # 3(x + 1), but not 24(个)
        | [ ]+\d+/\d                      # 5 1/2
        | %?[ ]*(?:[-+*/×÷·^]|x(?=[ ]*[$\d(]))                    # 48/2   24 + 3   3 x 4
          [ ]*(?:[-$€£(.\\\d]|[A-Za-z](?![A-Za-z]))               #   but neither $5/hour nor "12 - which"
    """,
    re.VERBOSE,
)
_FINAL_ANSWER = re.compile(f"####|{PHRASES}", re.IGNORECASE)

NO_RESULT = "no equation with a numeric result before the final answer"


class Corruption(NamedTuple):
    """A solution with one intermediate result replaced: rejected = answer[:start] + replacement + answer[end:]."""

    rejected: str
    start: int
    """First character of the replaced number in the answer."""
    end: int
    """One past its last character."""
    original: str
    replacement: str


@dataclass(frozen=True)
class MetaMath:
    """Worked solutions (GSM8K, MetaMathQA): one intermediate result wrong, everything after it untouched."""

    name: ClassVar[str] = "metamath"
    scaffold: ClassVar[Scaffold] = "question"

    question_field: str = field(default="question", metadata={"help": 'the problem; MetaMathQA: "query"'})
    answer_field: str = field(default="answer", metadata={"help": 'its solution; MetaMathQA: "response"'})

    def build(self, record: Mapping[str, Any], seed: int) -> list[BuiltPair]:
        question = text_field(record, self.question_field)
        answer = strip_calculator_marks(text_field(record, self.answer_field))
        corruption = corrupt_intermediate_result(answer, record_rng(seed, question, answer))
        if corruption is None:
            raise SkippedRecord(NO_RESULT, f"the answer ends {answer[-60:]!r}")
        edit = Edit(corruption.original, corruption.replacement, corruption.start, corruption.end)
        return [BuiltPair(question, answer, corruption.rejected, edit, _results(answer)[1])]


def final_answer(text: str) -> str | None:
    """The final answer of a solution: the last word on the line of the first "####", without thousands commas.

    Returns:
        The answer as text, for exact match, or None when there is no "####" or nothing follows it on its line.
    """
    _, mark, rest = text.partition("####")
    words = rest.partition("\n")[0].split()
    return words[-1].replace(",", "") if mark and words else None


def strip_calculator_marks(answer: str) -> str:
    """GSM8K's answer without its calculator marks: "48/2 = <<48/2=24>>24" becomes "48/2 = 24"."""
    return CALCULATOR_MARK.sub("", answer)


def corrupt_intermediate_result(answer: str, rng: random.Random) -> Corruption | None:
    """Replaces one intermediate result of a worked solution by another number and leaves the rest untouched.

    A result is a number after "=" with which the equation ends, outside of `protected` spans. One of them is drawn
    uniformly, never from the final answer ("#### 72", "The answer is: 72") and never the last result unless it is the
    only one. One of its digits then changes, so the number keeps its length, decimals, thousands commas, sign and
    currency.

    Args:
        answer: the solution, without calculator marks.
        rng: draws the result, the digit and its replacement.

    Returns:
        The corruption, positions in characters of `answer`, or None when there is no result to corrupt.

    Raises:
        ValueError: the answer holds calculator marks, in which the same result would stand twice.
    """
    if CALCULATOR_MARK.search(answer):
        raise ValueError("answer: expected no calculator marks, got <<...>>. Call strip_calculator_marks on it first.")
    results, _ = _results(answer)
    if not results:
        return None
    start, end = rng.choice(results[:-1] or results).span("number")
    replacement = change_one_digit(answer[start:end], rng)
    rejected = answer[:start] + replacement + answer[end:]
    return Corruption(rejected, start, end, answer[start:end], replacement)


def build_pairs(
    records: Iterable[Mapping[str, Any]],
    seed: int,
    *,
    question_field: str = "question",
    answer_field: str = "answer",
    counts: PairCounts | None = None,
) -> Iterator[dict[str, str]]:
    """Preference pairs from solved problems in memory, lazily and in order.

    Each record draws from its own generator, seeded by `seed` and its index: a pair does not depend on what happened
    to the records before it.

    Args:
        records: problems with a question and a worked solution, calculator marks allowed.
        seed: any integer; the same seed gives the same pairs on every platform.
        question_field: name of the question's field; "query" in MetaMathQA.
        answer_field: name of the solution's field; "response" in MetaMathQA.
        counts: updated as the pairs are consumed, if given.

    Yields:
        {"prompt", "chosen", "rejected", "edit_original", "edit_replacement"}, all str. Records without a result to
        corrupt yield nothing and are counted.

    Raises:
        ValueError: a record's question or answer is missing, empty or not a string.
    """
    counts = PairCounts() if counts is None else counts
    for index, record in enumerate(records):
        question = _text_field(record, question_field, index)
        answer = strip_calculator_marks(_text_field(record, answer_field, index))
        corruption = corrupt_intermediate_result(answer, random.Random(f"{seed}:{index}"))
        if corruption is None:
            counts.skipped[NO_RESULT] += 1
            continue
        counts.built += 1
        yield {
            "prompt": format_prompt(question),
            "chosen": format_completion(answer),
            "rejected": format_completion(corruption.rejected),
            "edit_original": corruption.original,
            "edit_replacement": corruption.replacement,
        }


def _results(answer: str) -> tuple[list[re.Match[str]], tuple[str, ...]]:
    """The results that could be corrupted, and the kinds of protected spans that hold others."""
    steps = in_ascii(answer)
    final = _FINAL_ANSWER.search(steps)
    steps = steps[: final.start()] if final else steps
    found = [match for match in _RESULT.finditer(steps) if not _GOES_ON.match(steps, match.end())]
    return outside_protected(answer, found, lambda match: match.span("number"))


def _text_field(record: Mapping[str, Any], name: str, index: int) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        got = repr(value) if name in record else f"fields {sorted(record)}"
        raise ValueError(f"records[{index}][{name!r}]: expected a non-empty string, got {got}.")
    return value
