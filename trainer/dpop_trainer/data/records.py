"""What a preference pair is, however a data set writes it, and what is said when a record is none.

Three kinds, which everything after this works on (`forms` knows how data sets write them):

    text      prompt, chosen, rejected are strings
    messages  they are lists of {"role", "content"} messages; without a prompt column (or with one that repeats a
              message as text) the prompt is the turns that chosen and rejected begin with in common
    tokens    prompt_ids, chosen_ids, rejected_ids are lists of token ids
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from dpop_trainer.data.edits import common_prefix_length
from dpop_trainer.data.messages import Message, described, read_messages, read_template_options
from dpop_trainer.data.pair_tree import PairIds

Kind = Literal["text", "messages", "tokens"]

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REF_SHARED_COLUMN = "ref_shared_logps"
ALL_REF_COLUMNS = (*REF_COLUMNS, REF_SHARED_COLUMN)
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


Pair: TypeAlias = TextPair | MessagesPair | PairIds

PAIR_TYPES: dict[Kind, type[Pair]] = {"text": TextPair, "messages": MessagesPair, "tokens": PairIds}


TIE = "tie"
"""What a row has for a kind whose record calls both answers equally good."""


class TiedRecord(Exception):
    """A sound record that prefers neither answer: no pair, and nothing wrong."""


class BadRecord(NamedTuple):
    """A record that cannot be used."""

    place: str
    """Where it stands: file and line, or its index."""
    reason: str
    """Field, what was expected, what was found, and the remedy."""


def read_text_pair(record: dict[str, Any]) -> TextPair:
    """
    Raises:
        ValueError: a field is not text, or an answer is empty.
    """
    for field in TEXT_COLUMNS:
        if not isinstance(record.get(field), str):
            raise ValueError(f"{field}: expected text, got {described(record.get(field))}. {_remedy(record, field)}")
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
    options = read_template_options(record)
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
        if not any(message.get("content") or message.get("tool_calls") for message in answer):
            raise ValueError(f"{field}: expected an answer with text, got an empty one. Remove the record.")
    return pair


def read_token_pair(record: dict[str, Any]) -> PairIds:
    """
    Raises:
        ValueError: a field is not a list of integers.
    """
    for field in TOKEN_COLUMNS:
        ids = record.get(field)
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise ValueError(
                f"{field}: expected lists of integer token ids, got {described(ids)}. Tokenise the record again."
            )
        if any(not -(2**31) <= i < 2**31 for i in ids):
            raise ValueError(f"{field}: expected token ids of 32 bits, got {max(ids, key=abs)}. Correct the record.")
    return PairIds(record["prompt_ids"], record["chosen_ids"], record["rejected_ids"])


def read_ref_logps(record: dict[str, Any]) -> dict[str, float]:
    """The reference log-probs that a record brings, by column; empty if it brings none.

    Raises:
        ValueError: there is one of the two only, or one is not a finite number.
    """
    logps = {}
    for field, other in (REF_COLUMNS, REF_COLUMNS[::-1]):
        if field not in record:
            continue
        if other not in record:
            raise ValueError(f"{other}: expected a column beside {field}, got none. Add it, or remove {field}.")
        value = record[field]
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            raise ValueError(
                f"{field}: expected a finite number, got {described(value)}. Compute the reference log-probs again."
            )
        logps[field] = float(value)
    shared = record.get(REF_SHARED_COLUMN)
    if shared is not None:
        if not logps or not isinstance(shared, int | float) or isinstance(shared, bool) or not _is_finite(shared):
            raise ValueError(
                f"{REF_SHARED_COLUMN}: expected a finite number beside {' and '.join(REF_COLUMNS)}, got "
                f"{described(shared)}. Compute the reference log-probs again, or remove the column."
            )
        logps[REF_SHARED_COLUMN] = float(shared)
    return logps


def raise_bad_records(name: str, num_records: int, bad_records: Sequence[BadRecord], remedy: str = "") -> None:
    """Raise one error for all bad records of a data set, if there are any.

    Raises:
        ValueError: there is at least one; the first five are spelt out, and all are counted.
    """
    if bad_records:
        lines = "".join(f"\n  {bad.place}: {bad.reason}" for bad in bad_records[:_MAX_REPORTED])
        more = f"\n  and {len(bad_records) - _MAX_REPORTED} more" if len(bad_records) > _MAX_REPORTED else ""
        raise ValueError(
            f"{name}: expected {num_records} usable records, got {len(bad_records)} that are not:{lines}{more}"
            + ("\n" + remedy if remedy else "")
        )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond fp64
        return False


def _read_messages(record: dict[str, Any], field: str) -> list[Message]:
    return read_messages(record.get(field), field, _remedy(record, field))


def _check_implicit_prompt(record: dict[str, Any], pair: MessagesPair) -> None:
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or all(message.get("content") != prompt for message in pair.prompt):
            raise ValueError(
                f"prompt: expected a list of messages as chosen has, got {described(prompt)}. Write it as messages, "
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
