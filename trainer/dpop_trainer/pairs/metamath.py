"""Low-edit pairs from worked solutions: the rejected answer is the chosen one with one intermediate result wrong.

    chosen     She sold 48/2 = 24 clips in May.\\nTogether that is 48+24 = 72 clips.\\n#### 72
    rejected   She sold 48/2 = 26 clips in May.\\nTogether that is 48+24 = 72 clips.\\n#### 72

Everything after the wrong number stays as it was, the final answer too. Such pairs are where plain DPO lowers the
chosen answer: its tokens after the edit are the rejected answer's tokens as well.

Works on MetaMath, GSM8K and anything else that writes its steps as equations and its final answer after "####".

Source: Pal et al. 2024, arXiv:2402.13228 (the paper's MetaMath pairs).
"""

import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
# "= 12", "= $1,250.50", "= -3", "= .5": only the number itself is in the group, so sign and currency stay
_RESULT = re.compile(r"= *-?[$€£]? ?-?(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
# What follows a number that is not a result but part of something longer.
_GOES_ON = re.compile(
    r"""  [\d.,:]*\d                      # 1,00000   3:15
        | [A-Za-z_](?![A-Za-z])           # 3x, but not 3km
        | [ ]*\(                          # 3(x + 1)
        | [ ]+\d+/\d                      # 5 1/2
        | %?[ ]*(?:[-+*/×÷·^]|x(?=[ ]*[$\d(]))                    # 48/2   24 + 3   3 x 4
          [ ]*(?:[-$€£(.\\\d]|[A-Za-z](?![A-Za-z]))               #   but neither $5/hour nor "12 - which"
    """,
    re.VERBOSE,
)
_FINAL_ANSWER = re.compile(r"####|the (?:final )?answer is", re.IGNORECASE)

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


@dataclass
class PairCounts:
    """What became of the records read so far."""

    built: int = 0
    """Records that became a pair."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Records that did not, by reason."""

    def __str__(self) -> str:
        reasons = "".join(f"; {count} skipped: {reason}" for reason, count in sorted(self.skipped.items()))
        return f"{self.built} pairs built{reasons}"


def format_prompt(question: str) -> str:
    """The prompt of a problem. It ends with a colon, so no tokenizer merges it with the completion's first word."""
    return f"Question: {question}\nAnswer:"


def format_completion(answer: str) -> str:
    """The completion that belongs to `format_prompt`: the answer behind one space."""
    return f" {answer}"


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
    return _CALCULATOR_MARK.sub("", answer)


def corrupt_intermediate_result(answer: str, rng: random.Random) -> Corruption | None:
    """Replaces one intermediate result of a worked solution by another number and leaves the rest untouched.

    A result is a number after "=" with which the equation ends. One of them is drawn uniformly, never from the final
    answer ("#### 72", "The answer is: 72") and never the last result unless it is the only one. One of its digits
    then changes, so the number keeps its length, decimals, thousands commas, sign and currency.

    Args:
        answer: the solution, without calculator marks.
        rng: draws the result, the digit and its replacement.

    Returns:
        The corruption, positions in characters of `answer`, or None when there is no result to corrupt.

    Raises:
        ValueError: the answer holds calculator marks, in which the same result would stand twice.
    """
    if _CALCULATOR_MARK.search(answer):
        raise ValueError("answer: expected no calculator marks, got <<...>>. Call strip_calculator_marks on it first.")
    final = _FINAL_ANSWER.search(answer)
    steps = answer[: final.start()] if final else answer
    results = [match for match in _RESULT.finditer(steps) if not _GOES_ON.match(steps, match.end())]
    if not results:
        return None
    start, end = rng.choice(results[:-1] or results).span("number")
    replacement = _change_one_digit(answer[start:end], rng)
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
    """Preference pairs from solved problems, lazily and in order.

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


def write_pairs(
    source_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    seed: int,
    limit: int | None = None,
    *,
    question_field: str = "question",
    answer_field: str = "answer",
) -> PairCounts:
    """`build_pairs` from one JSONL file to another. The output appears only when it is complete.

    Args:
        source_path: one JSON object per line; blank lines are passed over.
        out_path: where the pairs go, replaced if it exists; missing folders are made.
        seed: as in `build_pairs`.
        limit: read the first so many records; None reads them all.
        question_field: as in `build_pairs`.
        answer_field: as in `build_pairs`.

    Returns:
        How many pairs were built and why records were skipped.

    Raises:
        ValueError: a line is not a JSON object (file and line are named), a record is malformed (file, record and
            field are named), or limit < 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a number >= 1 or None, got {limit}.")
    source_path, out_path = Path(source_path), Path(out_path)
    counts = PairCounts()
    records = itertools.islice(_read_jsonl(source_path), limit)
    pairs = build_pairs(records, seed, question_field=question_field, answer_field=answer_field, counts=counts)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = out_path.with_name(out_path.name + ".partial")
    try:
        with partial_path.open("w", encoding="ascii") as out:
            for pair in pairs:
                out.write(json.dumps(pair) + "\n")  # escaped: a raw U+2028 ends the line for some readers
        partial_path.replace(out_path)
    except ValueError as error:
        raise ValueError(f"{source_path}: {error}") from error
    finally:
        partial_path.unlink(missing_ok=True)
    return counts


def _change_one_digit(number: str, rng: random.Random) -> str:
    """Another number of the same form: one digit differs, and a leading digit never becomes 0."""
    position = rng.choice([i for i, character in enumerate(number) if character.isdigit()])
    digits = "123456789" if position == 0 else "0123456789"
    digit = rng.choice(digits.replace(number[position], ""))
    return number[:position] + digit + number[position + 1 :]


def _text_field(record: Mapping[str, Any], name: str, index: int) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        got = repr(value) if name in record else f"fields {sorted(record)}"
        raise ValueError(f"records[{index}][{name!r}]: expected a non-empty string, got {got}.")
    return value


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)  # decodes UTF-8 with or without a byte order mark
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"line {line_number}: expected a JSON object, got {error}.") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {line_number}: expected a JSON object, got {type(record).__name__}.")
            yield record
