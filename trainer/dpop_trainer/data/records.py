"""What a preference pair may look like in a data set, and what is said when it does not.

Three forms, one per data set:

    text      prompt, chosen, rejected are strings
    messages  they are lists of {"role", "content"} messages; without a prompt column (or with one that repeats a
              message as text) the prompt is the turns that chosen and rejected begin with in common
    tokens    prompt_ids, chosen_ids, rejected_ids are lists of token ids
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

from datasets import Dataset

from dpop_trainer.data.pair_tree import PairIds
from dpop_trainer.edits import common_prefix_length

Form = Literal["text", "messages", "tokens"]
Message: TypeAlias = dict[str, Any]

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REF_SHARED_COLUMN = "ref_shared_logps"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")

_MAX_REPORTED = 5


class TextPair(NamedTuple):
    """A pair of strings."""

    prompt: str
    chosen: str
    rejected: str


class MessagesPair(NamedTuple):
    """A pair of message lists: the prompt's turns, and the turns that each answer adds to them."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    template_options: dict[str, Any]
    """What the chat template is called with besides the messages."""


def check_pairs(dataset: Dataset) -> Form:
    """Check every record of a data set.

    Returns:
        The form that its pairs have.

    Raises:
        ValueError: columns are missing or of the wrong type, or records cannot be used; the message names the first
            five of these by index, with field, what was expected and what was found.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}. "
            "Take one split, not streamed; load_pairs does."
        )
    form = form_of(dataset)
    records = dataset.with_format(None).select_columns(used_columns(dataset))
    raise_problems("pairs", len(records), (_problem(record, PAIR_READERS[form]) for record in records))
    return form


def form_of(dataset: Dataset) -> Form:
    """The form that the data set's columns say its pairs have.

    Raises:
        ValueError: the columns are those of none.
    """
    columns = dataset.column_names
    if set(TOKEN_COLUMNS) <= set(columns):
        for column in TOKEN_COLUMNS:
            _check_token_column(dataset, column)
        return "tokens"
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"columns: expected prompt, chosen and rejected, or prompt_ids, chosen_ids and rejected_ids, "
            f"got {columns}. Rename the columns with Dataset.rename_columns."
        )
    first = next((answer for answer in dataset["chosen"] if answer is not None), None)
    if isinstance(first, list):
        return "messages"
    if "prompt" not in columns:
        raise ValueError(
            f"columns: expected a prompt beside chosen and rejected texts, got {columns}. Add the column prompt; "
            "only answers given as lists of messages can contain it."
        )
    return "text"


def used_columns(dataset: Dataset) -> list[str]:
    """The columns that tokenising reads, in the data set's order."""
    token_columns = set(TOKEN_COLUMNS)
    is_tokenised = token_columns <= set(dataset.column_names)
    used = token_columns if is_tokenised else {*TEXT_COLUMNS, *TEMPLATE_COLUMNS}
    refs = (*REF_COLUMNS, REF_SHARED_COLUMN)
    return [column for column in dataset.column_names if column in used or column in refs]


def read_text_pair(record: dict[str, Any]) -> TextPair:
    """
    Raises:
        ValueError: a field is not text, or an answer is empty.
    """
    for field in TEXT_COLUMNS:
        if not isinstance(record.get(field), str):
            raise ValueError(f"{field}: expected text, got {_described(record.get(field))}. {_remedy(record, field)}")
        if field != "prompt" and not record[field]:
            raise ValueError(f"{field}: expected an answer of at least one character, got ''. Remove the record.")
    return TextPair(record["prompt"], record["chosen"], record["rejected"])


def read_messages_pair(record: dict[str, Any]) -> MessagesPair:
    """The pair with its prompt apart from its answers, wherever the record has it.

    Raises:
        ValueError: a field is not a list of messages, a message lacks its role or text, there is no prompt, an
            answer is empty or begins with a turn that is not its own, or `tools` is neither a list nor its JSON.
    """
    chosen, rejected = _read_messages(record, "chosen"), _read_messages(record, "rejected")
    options = _read_template_options(record)
    if isinstance(record.get("prompt"), list):
        pair = MessagesPair(_read_messages(record, "prompt"), chosen, rejected, options)
    else:
        # each answer keeps at least one turn, also where the two are the same or one continues the other
        num_shared = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        pair = MessagesPair(chosen[:num_shared], chosen[num_shared:], rejected[num_shared:], options)
        _check_implicit_prompt(record, pair)
    for field, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if answer[0]["role"] in ("system", "developer", "user"):
            raise ValueError(
                f"{field}: expected an answer that begins with the assistant's turn, got role {answer[0]['role']!r}. "
                "Leave the prompt's turns either in the column prompt alone, or equal in chosen and rejected alone."
            )
        if not any(message["content"] or message.get("tool_calls") for message in answer):
            raise ValueError(f"{field}: expected an answer with text, got empty messages. Remove the record.")
    return pair


def read_token_pair(record: dict[str, Any]) -> PairIds:
    """
    Raises:
        ValueError: a field is null or holds nulls.
    """
    for field in TOKEN_COLUMNS:
        if record[field] is None or None in record[field]:
            raise ValueError(f"{field}: expected a list of token ids, got {_described(record[field])}.")
    return PairIds(record["prompt_ids"], record["chosen_ids"], record["rejected_ids"])


PAIR_READERS: dict[Form, Callable[[dict[str, Any]], NamedTuple]] = {
    "text": read_text_pair,
    "messages": read_messages_pair,
    "tokens": read_token_pair,
}


def raise_problems(name: str, num_records: int, problems: Iterable[str | None]) -> None:
    """Raise one error for all records that have a problem; `problems` holds one entry per record, in order.

    Raises:
        ValueError: there is at least one; the first five are spelt out, and all are counted.
    """
    found = [(index, problem) for index, problem in enumerate(problems) if problem]
    if found:
        lines = "".join(f"\n  record {index}: {problem}" for index, problem in found[:_MAX_REPORTED])
        more = f"\n  and {len(found) - _MAX_REPORTED} more" if len(found) > _MAX_REPORTED else ""
        raise ValueError(f"{name}: expected {num_records} usable records, got {len(found)} that are not:{lines}{more}")


def _problem(record: Any, read_pair: Callable) -> str | None:
    try:
        read_pair(record)
        _check_ref_logps(record)
    except ValueError as error:
        return str(error)
    return None


def _check_token_column(dataset: Dataset, column: str) -> None:
    item = getattr(dataset.features[column], "feature", None)
    if not str(getattr(item, "dtype", None)).startswith(("int", "uint", "null")):
        raise ValueError(f"{column}: expected lists of integer token ids, got {dataset.features[column]}.")


def _check_ref_logps(record: dict[str, Any]) -> None:
    for field, other in (REF_COLUMNS, REF_COLUMNS[::-1]):
        if field not in record:
            continue
        if other not in record:
            raise ValueError(f"{other}: expected a column beside {field}, got none. Add it, or remove {field}.")
        logps = record[field]
        if not isinstance(logps, (int, float)) or not math.isfinite(logps):
            raise ValueError(
                f"{field}: expected a finite number, got {_described(logps)}. Compute the reference log-probs again."
            )


def _read_messages(record: dict[str, Any], field: str) -> list[Message]:
    messages = record.get(field)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{field}: expected a list of messages, got {_described(messages)}. {_remedy(record, field)}")
    return [_read_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _read_message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        got = f"the keys {sorted(message)}" if isinstance(message, dict) else _described(message)
        raise ValueError(f"{name}: expected a message with the keys role and content, got {got}. Rename its keys.")
    if not isinstance(message["role"], str) or not message["role"]:
        raise ValueError(f"{name}.role: expected text, got {_described(message['role'])}. Name who speaks.")
    if not isinstance(message["content"], str) and not (message["content"] is None and message.get("tool_calls")):
        raise ValueError(
            f"{name}.content: expected text, got {_described(message['content'])}. Only text can be trained on."
        )
    # Arrow gives every message every key that any message has; templates take a null key for a present one
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _read_template_options(record: dict[str, Any]) -> dict[str, Any]:
    tools = record.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"tools: expected a list or its JSON, got {_described(tools)} ({error}).") from error
    # null for an empty list: some templates write tool instructions for that too
    return {"tools": tools or None, **(record.get("chat_template_kwargs") or {})}


def _check_implicit_prompt(record: dict[str, Any], pair: MessagesPair) -> None:
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or all(message["content"] != prompt for message in pair.prompt):
            raise ValueError(
                f"prompt: expected a list of messages as chosen has, got {_described(prompt)}. Write it as messages, "
                "or remove the column if chosen and rejected begin with the prompt's turns."
            )
    if not pair.prompt:
        raise ValueError(
            "chosen: expected to begin with the same turns as rejected, which are the prompt, got no turn in common. "
            "Add the column prompt, or begin both with it."
        )


def _remedy(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        return "Fill the field or remove the record."
    if isinstance(value, dict):
        return "Put the message into a list."
    return "Give prompt, chosen and rejected one form, text or messages, in every record."


def _described(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
