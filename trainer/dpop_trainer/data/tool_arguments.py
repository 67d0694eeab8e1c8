"""Arguments of tool calls as the chat template wants them: as objects, which most write as JSON, or as JSON's text.

OpenAI's messages carry them as text always; a template that writes JSON would encode that a second time. Others put the
text down as it is, and of an object they would make Python's notation, or an error.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from dpop_trainer.data.messages import Message
from dpop_trainer.data.records import MessagesPair


def has_tool_calls(pair: MessagesPair) -> bool:
    """Whether any turn of the pair calls a tool."""
    return any(message.get("tool_calls") for message in _messages(pair))


def as_objects(pair: MessagesPair) -> MessagesPair:
    """The pair with arguments that are the JSON of an object decoded, once; other text stays text."""
    return _with_arguments(pair, _decoded)


def as_texts(pair: MessagesPair) -> MessagesPair:
    """The pair with arguments as text: what was text as it was written, an object as its JSON."""
    return _with_arguments(pair, _encoded)


def is_in_python(pair: MessagesPair, texts: tuple[str, ...]) -> bool:
    """Whether one of the texts has an object of arguments in Python's notation, {'a': True}."""
    shown = [
        str(arguments)
        for message in _messages(pair)
        for call in message.get("tool_calls") or []
        if isinstance(arguments := _function(call).get("arguments"), dict) and arguments
    ]
    return any(notation in text for notation in shown for text in texts)


def _messages(pair: MessagesPair) -> Iterator[Message]:
    yield from (*pair.prompt, *pair.chosen, *pair.rejected)


def _function(call: dict[str, Any]) -> dict[str, Any]:
    """Where name and arguments stand: inside, as OpenAI nests them, or in the call itself."""
    inner = call.get("function")
    return inner if isinstance(inner, dict) else call


def _with_arguments(pair: MessagesPair, convert: Callable[[Any], Any]) -> MessagesPair:
    def call_of(call: dict[str, Any]) -> dict[str, Any]:
        function = _function(call)
        if "arguments" not in function:
            return call
        converted = {**function, "arguments": convert(function["arguments"])}
        return converted if function is call else {**call, "function": converted}

    def turns(messages: list[Message]) -> list[Message]:
        return [
            {**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]

    return pair._replace(prompt=turns(pair.prompt), chosen=turns(pair.chosen), rejected=turns(pair.rejected))


def _decoded(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):  # what a model wrote need not be JSON
        return arguments
    return value if isinstance(value, dict) else arguments


def _encoded(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
