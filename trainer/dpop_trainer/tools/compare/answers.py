"""What a model answers to held-out prompts, greedily: how many it solves, graded against the chosen answers, and how
it writes."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset

from dpop_trainer.measure.generation import Writing, generate_completions
from dpop_trainer.measure.matchers import Verdict, find_matcher
from dpop_trainer.models.trained import TrainedModel


class Answers(NamedTuple):
    """A model's graded answers."""

    num_right: int
    num_without_answer: int
    """Of those that are not right: nothing that the matcher takes for an answer, as where the model did not end."""
    num_prompts: int
    verdicts: str = ""
    """One letter a problem, in their order: r right, w wrong, n no answer. Older records have none."""

    @property
    def right_share(self) -> float:
        return self.num_right / self.num_prompts

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Answers":
        letters = "".join(_LETTERS[verdict] for verdict in verdicts)
        return cls(letters.count("r"), letters.count("n"), len(letters), letters)


_LETTERS: dict[Verdict, str] = {True: "r", False: "w", None: "n"}


class Gain(NamedTuple):
    """How many more of the same problems are solved: a mean over them, and its standard error; shares of 1."""

    mean: float
    error: float


def right_gain(after: Sequence[Answers], before: Answers) -> Gain | None:
    """Paired by problem, of each the mean over the models in `after`; None where the verdicts were not recorded."""
    if before.num_prompts < 2 or not all(answers.verdicts for answers in (before, *after)):
        return None
    of_problems = zip(before.verdicts, *(answers.verdicts for answers in after), strict=True)
    gained = [now.count("r") / len(now) - (then == "r") for then, *now in of_problems]
    return Gain(statistics.fmean(gained), statistics.stdev(gained) / math.sqrt(len(gained)))


class Answered(NamedTuple):
    """A model's answers to all held-out prompts that it was asked."""

    graded: Answers | None
    """None where nobody graded them."""
    writing: Writing


NOT_GRADED = "none"
"""The matcher of answers that nothing can be held against, as in a conversation."""


@dataclass(frozen=True)
class Grading:
    """How answers are made and graded."""

    matcher: str
    """A name of `MATCHERS`, "regex" or `NOT_GRADED`."""
    answer_regex: str | None = None
    max_answers: int = 128
    max_new_tokens: int = 256
    answer_batch_size: int = 32

    def __post_init__(self) -> None:
        if self.matcher == NOT_GRADED and self.answer_regex:
            raise ValueError(f"answer_regex: expected none with matcher {NOT_GRADED!r}, got {self.answer_regex!r}.")
        self.matches()
        for name in ("max_answers", "max_new_tokens", "answer_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")

    def matches(self) -> Callable[[str, str], Verdict] | None:
        """Sample, label -> verdict; None where answers are not graded."""
        return None if self.matcher == NOT_GRADED else find_matcher(self.matcher, self.answer_regex)


class Problem(NamedTuple):
    """A prompt, and the text that its answer is graded against."""

    prompt_ids: list[int]
    label: str


def problems_of(dataset: Dataset, tokenizer: Any, grading: Grading) -> list[Problem]:
    """The first prompts of tokenised pairs, each once, with the chosen answer of its first pair.

    Args:
        dataset: pairs as `tokenise_pairs` returns them, not truncated.
        tokenizer: to read the chosen answers as text again.
        grading: how many, and by which matcher.

    Raises:
        ValueError: a chosen answer holds nothing that the matcher could look for.
    """
    matches = grading.matches()
    problems: dict[tuple[int, ...], Problem] = {}
    for row, pair in enumerate(dataset):
        key = tuple(pair["prompt_ids"])  # type: ignore[call-overload]
        if key in problems:
            continue
        label = tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True)  # type: ignore[call-overload]
        try:
            if matches is not None and matches(label, label) is None:
                raise ValueError("it announces no answer")
        except ValueError as error:
            raise ValueError(
                f"held-out pair {row}: expected a chosen answer that matcher {grading.matcher!r} can grade against, "
                f"got {label[-80:]!r} ({error}). Choose another --matcher."
            ) from error
        problems[key] = Problem(list(key), label)
        if len(problems) == grading.max_answers:
            break
    return list(problems.values())


def answer_problems(trained: TrainedModel, problems: Sequence[Problem], grading: Grading, *, desc: str) -> Answered:
    """Let the model answer every problem, and count.

    Args:
        trained: model and tokenizer.
        problems: from `problems_of`.
        grading: how answers are made and graded.
        desc: label of the progress bar.
    """
    completions = generate_completions(
        trained.model,
        trained.tokenizer,
        [problem.prompt_ids for problem in problems],
        max_new_tokens=grading.max_new_tokens,
        batch_size=grading.answer_batch_size,
        desc=desc,
    )
    matches, graded = grading.matches(), None
    if matches is not None:
        pairs = zip(completions, problems, strict=True)
        graded = Answers.of([matches(completion.text, problem.label) for completion, problem in pairs])
    return Answered(graded, Writing.of(completions))
