"""The forms in which data sets write preference pairs: one entry each, recognised by its columns.

A form says from a sample of a data set (column -> its first value that is not null) whether the data set has it, and
turns a record into a pair: of messages where it is known who speaks, to which the chat template is applied, else of
text as it is. To add one, write its converter and put it into `FORMS`, before any form that would recognise the same
columns; docs/data.md shows an example of each, in the same order.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpop_trainer.data.edits import common_prefix_length
from dpop_trainer.data.messages import described, read_messages, read_template_options, read_turns
from dpop_trainer.data.records import (
    TEMPLATE_COLUMNS,
    TEXT_COLUMNS,
    TOKEN_COLUMNS,
    MessagesPair,
    Pair,
    TextPair,
    TiedRecord,
    read_messages_pair,
    read_text_pair,
    read_token_pair,
)

Sample = Mapping[str, Any]

_QUESTIONS = ("question", "instruction", "prompt", "input")
_ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
# two answers -> what `label` says where the first is better, the second, and neither
_LABELLED = {
    ("output_1", "output_2"): (1, 2, "tie"),  # LLMBar
    ("response_1", "response_2"): (1, 2, "tie"),
    ("response 1", "response 2"): (0, 1, 2),  # Auto-J
}
# what a scored answer is called, and its score; UltraFeedback's overall_score is wrong in places, the other is not
_COMPLETION_TEXTS = ("response", "text", "content", "completion")
_COMPLETION_SCORES = ("fine-grained_score", "overall_score", "score", "rating", "reward")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Form(NamedTuple):
    """One way to write a pair."""

    name: str
    columns: tuple[str, ...]
    """Every column that the converter reads."""
    recognise: Callable[[Sample], bool]
    """Whether a data set with this sample has the form."""
    convert: Callable[[dict[str, Any]], Pair]
    """A record's pair; ValueError says which field cannot be used, by the data set's own name for it, and why."""


def recognise_form(sample: Sample, *, completions: bool = False) -> Form:
    """The form of a data set.

    Args:
        sample: every column of the data set, with its first value that is not null (null where there is none).
        completions: prompt and completion, without a rejected answer, are a form too.

    Raises:
        ValueError: the columns are those of no form.
    """
    for form in [*FORMS, COMPLETION_FORM] if completions else FORMS:
        if form.recognise(sample):
            return form
    columns = list(sample)
    if {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"columns: expected two answers to each prompt, got {columns}. Train on answers without a rejected one "
            "with `dpop sft`, or with KTOTrainer where a boolean label says which are good."
        )
    if {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            "columns: expected chosen and rejected as texts or as lists of messages, got "
            f"{described(sample['chosen'])} and {described(sample['rejected'])} among {columns}. Write them as text."
        )
    missing = [column for column in TEXT_COLUMNS if column not in sample]
    raise ValueError(
        "columns: expected prompt, chosen and rejected, or those of another form "
        f"({', '.join(form.name for form in FORMS)}; docs/data.md shows each), got {columns}. Of the first, "
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: rename the columns, or make pairs of "
        "problems and their answers with `dpop pairs build`."
    )


def sharegpt_pair(record: dict[str, Any]) -> MessagesPair:
    """`conversations`, `chosen`, `rejected` of {"from", "value"}, with `system` and `tools` where there are any."""
    prompt = [*_system_turn(record), *read_turns(record.get("conversations"), "conversations")]
    return _checked(
        prompt, read_turns(record.get("chosen"), "chosen"), read_turns(record.get("rejected"), "rejected"), record
    )


def sharegpt_whole_pair(record: dict[str, Any]) -> MessagesPair:
    """`chosen` and `rejected` as whole conversations of {"from", "value"}; the prompt is what they begin with."""
    whole = {field: read_turns(record.get(field), field) for field in ("chosen", "rejected")}
    system = _system_turn(record)
    return read_messages_pair(
        {"chosen": system + whole["chosen"], "rejected": system + whole["rejected"], "tools": record.get("tools")}
    )


def openai_pair(record: dict[str, Any]) -> MessagesPair:
    """`input` of {"messages", "tools"}, `preferred_output` and `non_preferred_output`, which are messages."""
    given = record.get("input")
    if not isinstance(given, dict):
        raise ValueError(f"input: expected an object with messages, got {described(given)}. Remove the record.")
    return _checked(
        read_messages(given.get("messages"), "input.messages"),
        read_messages(record.get("preferred_output"), "preferred_output"),
        read_messages(record.get("non_preferred_output"), "non_preferred_output"),
        {"tools": given.get("tools")},
        ("preferred_output", "non_preferred_output"),
    )


def question_pair(record: dict[str, Any]) -> MessagesPair:
    """A question and two answers as text, with a system prompt, further input or earlier turns where there are any."""
    names = next((names for names in _ANSWERS if record.get(names[0]) is not None), _ANSWERS[0])
    return _asked(record, {name: record.get(name) for name in names})


def labelled_pair(record: dict[str, Any]) -> MessagesPair:
    """A question, two answers and the label that says which is better.

    Raises:
        TiedRecord: neither is.
    """
    names = next((names for names in _LABELLED if names[0] in record), next(iter(_LABELLED)))
    first, second, tie = _LABELLED[names]
    label = record.get("label")
    said = label.strip().casefold() if isinstance(label, str) else None if isinstance(label, bool) else label
    by_label = {str(first): names, str(second): names[::-1]}
    if str(said) == str(tie):
        raise TiedRecord
    if str(said) not in by_label:
        raise ValueError(
            f"label: expected {first} ({names[0]} is better), {second} ({names[1]}) or {tie!r} (neither), got "
            f"{described(label)}. Number them so, or remove the record."
        )
    return _asked(record, {name: record.get(name) for name in by_label[str(said)]})


def scored_pair(record: dict[str, Any]) -> MessagesPair:
    """A question and several answers with scores: the best against the worst.

    Raises:
        TiedRecord: all have the same score.
    """
    completions = record.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError(
            f"completions: expected a list of two answers or more, got {described(completions)}. Remove the record."
        )
    texts, scores = [], []
    for i, completion in enumerate(completions):
        if isinstance(completion, dict):
            text = completion.get(_first_given(completion, _COMPLETION_TEXTS))
            score, place = completion.get(_first_given(completion, _COMPLETION_SCORES)), f"completions[{i}]"
        else:
            given = record.get("scores")
            text, place = completion, "scores"
            score = given[i] if isinstance(given, list) and len(given) == len(completions) else None
        if not isinstance(text, str):
            raise ValueError(f"completions[{i}]: expected an answer as text, got {described(completion)}. Remove it.")
        try:
            scores.append(float(score))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            scores.append(math.nan)
        if isinstance(score, bool) or not math.isfinite(scores[-1]):
            raise ValueError(f"{place}: expected a score for each answer, got {described(score)}. Remove the record.")
        texts.append(text)
    best, worst = (scores.index(end(scores)) for end in (max, min))
    if scores[best] == scores[worst]:
        raise TiedRecord
    return _asked(record, {f"completions[{i}]": texts[i] for i in (best, worst)})


def _asked(record: dict[str, Any], answers: dict[str, Any]) -> MessagesPair:
    """The pair of the record's question and two answers, the better first, by the names of their fields."""
    chosen, rejected = answers
    field = _first_given(record, _QUESTIONS)
    texts = {field: record.get(field), **answers}
    question_fields = [field]
    if field == "instruction" and record.get("input") is not None:
        texts["input"] = record["input"]
        question_fields.append("input")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected text, got {described(text)}. Fill the field or remove the record.")
    question = "\n".join(text for text in (texts[name] for name in question_fields) if text)
    prompt = [*_system_turn(record), *_history(record), {"role": "user", "content": question}]
    better, worse = ([{"role": "assistant", "content": texts[name]}] for name in (chosen, rejected))
    return _checked(prompt, better, worse, record, (chosen, rejected))


def transcript_pair(record: dict[str, Any]) -> MessagesPair:
    """`chosen` and `rejected` as whole transcripts of Human and Assistant, as Anthropic's HH-RLHF has them."""
    return read_messages_pair({field: _transcript(record.get(field), field) for field in ("chosen", "rejected")})


def whole_text_pair(record: dict[str, Any]) -> TextPair:
    """`chosen` and `rejected` as whole texts; the prompt is what they begin with, less a last space, as in TRL."""
    for field in ("chosen", "rejected"):
        if not isinstance(record.get(field), str):
            raise ValueError(
                f"{field}: expected text, got {described(record.get(field))}. Fill the field or remove the record."
            )
    chosen, rejected = record["chosen"], record["rejected"]
    length, shortest = common_prefix_length(chosen, rejected), min(len(chosen), len(rejected))
    if length == shortest:
        length -= 1  # an answer is left to either
    elif chosen[:length].endswith(" "):
        length -= 1
    if length < 1:
        raise ValueError(
            f"chosen: expected to begin with the same text as rejected, which is the prompt, got {described(chosen)} "
            f"and {described(rejected)}. Add the column prompt."
        )
    return TextPair(chosen[:length], chosen[length:], rejected[length:])


def json_messages_pair(record: dict[str, Any]) -> MessagesPair:
    """Messages whose lists are written as JSON."""
    parsed = dict(record)
    for field in TEXT_COLUMNS:
        text = record.get(field)
        if isinstance(text, str) and (field != "prompt" or text.lstrip().startswith("[")):
            try:
                parsed[field] = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{field}: expected the JSON of a list of messages, got {described(text)} ({error}). "
                    "Correct the field or remove the record."
                ) from error
    return read_messages_pair(parsed)


def completion_pair(record: dict[str, Any]) -> Pair:
    """`prompt` and `completion`: a pair whose two answers are the same, for supervised fine-tuning."""
    completion = record.get("completion")
    if isinstance(completion, list):
        try:
            return read_messages_pair({**record, "chosen": completion, "rejected": completion})
        except ValueError as error:
            raise ValueError(re.sub("^(chosen|rejected)", "completion", str(error))) from error
    for field in ("prompt", "completion"):
        if not isinstance(record.get(field), str):
            remedy = "Give prompt and completion one form, text or messages, in every record."
            if record.get(field) is None:
                remedy = "Fill the field or remove the record."
            raise ValueError(f"{field}: expected text, got {described(record.get(field))}. {remedy}")
    if not completion:
        raise ValueError("completion: expected an answer of at least one character, got ''. Remove the record.")
    return TextPair(record["prompt"], completion, completion)


def _first_given(record: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of these fields that has a value; of a record without any, the field that it is to be told to fill."""
    given = (name for name in names if record.get(name) is not None)
    present = (name for name in names if name in record)
    return next(given, next(present, names[0]))


def _system_turn(record: dict[str, Any]) -> list[dict[str, Any]]:
    system = record.get("system")
    if system is None or system == "":
        return []
    if not isinstance(system, str):
        raise ValueError(f"system: expected text, got {described(system)}. Correct or empty the field.")
    return [{"role": "system", "content": system}]


def _history(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier turns as a list of [question, answer]."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"history: expected a list of [question, answer], got {described(history)}. Correct it.")
    turns = []
    for index, exchange in enumerate(history):
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise ValueError(
                f"history[{index}]: expected [question, answer], got {described(exchange)}. Correct or remove it."
            )
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return turns


def _transcript(text: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(text, str):
        raise ValueError(f"{field}: expected text, got {described(text)}. Fill the field or remove the record.")
    before, *parts = _HH_TURN.split("\n\n" + text.lstrip())
    if before or not parts:
        raise ValueError(
            f"{field}: expected a transcript that begins with 'Human:', got {described(text)}. Remove the record."
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _checked(
    prompt: list, chosen: list, rejected: list, record: dict[str, Any], names: tuple[str, str] = ("chosen", "rejected")
) -> MessagesPair:
    """The pair, if its answers begin with a turn of their own and have text.

    Raises:
        ValueError: they do not; named as in the data set.
    """
    for name, answer in zip(names, (chosen, rejected), strict=True):
        if answer[0]["role"] in ("system", "developer", "user"):
            raise ValueError(
                f"{name}: expected an answer that begins with the assistant's turn, got role {answer[0]['role']!r}. "
                "Leave the prompt's turns out of the answers."
            )
        if not any(message.get("content") or message.get("tool_calls") for message in answer):
            raise ValueError(f"{name}: expected an answer with text, got an empty one. Remove the record.")
    return MessagesPair(prompt, chosen, rejected, read_template_options(record))


def _has_sharegpt_turns(value: Any) -> bool:
    turn = value[0] if isinstance(value, list) and value else value
    return isinstance(turn, dict) and {"from", "value"} <= turn.keys()


def _is_question(sample: Sample) -> bool:
    if not any(isinstance(sample.get(chosen), str) and rejected in sample for chosen, rejected in _ANSWERS):
        return False
    if "prompt" in sample and "chosen" in sample:
        # a plain text pair, unless a system prompt shows that it is a turn of a chat
        return "system" in sample and isinstance(sample["prompt"], str)
    return any(isinstance(sample.get(name), str) for name in _QUESTIONS)


def _is_transcript(sample: Sample) -> bool:
    return "prompt" not in sample and all(
        isinstance(sample.get(field), str) and sample[field].lstrip().startswith("Human:")
        for field in ("chosen", "rejected")
    )


def _is_whole_text(sample: Sample) -> bool:
    return "prompt" not in sample and all(isinstance(sample.get(field), str) for field in ("chosen", "rejected"))


def _is_json_messages(sample: Sample) -> bool:
    for field in ("chosen", "rejected"):
        text = sample.get(field)
        if not isinstance(text, str) or not text.lstrip().startswith("[{"):
            return False
        try:
            read_messages(json.loads(text), field)
        except (ValueError, RecursionError):
            return False
    return True


def _has(*columns: str) -> Callable[[Sample], bool]:
    return lambda sample: set(columns) <= set(sample)


def _has_messages(sample: Sample) -> bool:
    return _has("chosen", "rejected")(sample) and isinstance(sample["chosen"], list)


FORMS = (
    Form("token ids", TOKEN_COLUMNS, _has(*TOKEN_COLUMNS), read_token_pair),
    Form(
        "OpenAI preference (input, preferred_output, non_preferred_output)",
        ("input", "preferred_output", "non_preferred_output"),
        _has("input", "preferred_output", "non_preferred_output"),
        openai_pair,
    ),
    Form(
        "ShareGPT (conversations, chosen, rejected)",
        ("conversations", "chosen", "rejected", "system", "tools"),
        lambda sample: (
            _has("conversations", "chosen", "rejected")(sample)
            and (sample["chosen"] is None or _has_sharegpt_turns(sample["chosen"]))
        ),
        sharegpt_pair,
    ),
    Form(
        "ShareGPT conversations (chosen, rejected)",
        ("chosen", "rejected", "system", "tools"),
        lambda sample: all(
            isinstance(sample.get(field), list) and _has_sharegpt_turns(sample[field])
            for field in ("chosen", "rejected")
        ),
        sharegpt_whole_pair,
    ),
    Form("messages", (*TEXT_COLUMNS, *TEMPLATE_COLUMNS), _has_messages, read_messages_pair),
    Form("messages as JSON", (*TEXT_COLUMNS, *TEMPLATE_COLUMNS), _is_json_messages, json_messages_pair),
    Form(
        "question and answers",
        (*_QUESTIONS, "system", "history", "tools", *(name for names in _ANSWERS for name in names)),
        _is_question,
        question_pair,
    ),
    Form(
        "two answers and a label",
        (*_QUESTIONS, "label", "system", "history", "tools", *(name for names in _LABELLED for name in names)),
        lambda sample: (
            "label" in sample
            and any(set(names) <= set(sample) for names in _LABELLED)
            and any(isinstance(sample.get(name), str) for name in _QUESTIONS)
        ),
        labelled_pair,
    ),
    Form(
        "answers with scores",
        (*_QUESTIONS, "completions", "scores", "system", "history", "tools"),
        lambda sample: (
            isinstance(sample.get("completions"), list)
            and any(isinstance(sample.get(name), str) for name in _QUESTIONS)
            and "chosen" not in sample
        ),
        scored_pair,
    ),
    Form("transcripts (Human, Assistant)", ("chosen", "rejected"), _is_transcript, transcript_pair),
    Form("text", TEXT_COLUMNS, _has(*TEXT_COLUMNS), read_text_pair),
    Form("text that begins with its prompt", ("chosen", "rejected"), _is_whole_text, whole_text_pair),
)

COMPLETION_FORM = Form(
    "prompt and completion",
    ("prompt", "completion", *TEMPLATE_COLUMNS),
    lambda sample: _has("prompt", "completion")(sample) and "rejected" not in sample,
    completion_pair,
)

FORMS_BY_NAME = {form.name: form for form in (*FORMS, COMPLETION_FORM)}
