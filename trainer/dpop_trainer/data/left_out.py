"""What a chat template does not write of a pair: reasoning that it strips, calls or tools that it does not know."""

from collections.abc import Iterator
from typing import Any

from dpop_trainer.data.records import MessagesPair

_REASONING = ("reasoning_content", "reasoning", "thinking")
_NOT_THE_MODELS = {"user", "system", "developer", "tool", "function", "ipython", "observation"}


def leaves_out(pair: MessagesPair, prompt: str, prompt_chosen: str, prompt_rejected: str) -> bool:
    """Whether the template's texts lack something of an answer's turns, or a tool. White space does not count.

    Of the prompt's own turns nothing is asked: templates leave the reasoning of earlier turns out by design.
    """
    if _lacks(prompt, _names(pair.template_options.get("tools"))):
        return True
    return any(
        _lacks(text, _parts(message))
        for messages, text in ((pair.chosen, prompt_chosen), (pair.rejected, prompt_rejected))
        for message in messages
        if message["role"] not in _NOT_THE_MODELS
    )


def has_foreign_turns(pair: MessagesPair) -> bool:
    """Whether an answer goes on over turns that the model does not write: a user's, a tool's. They would be scored."""
    return any(message["role"] in _NOT_THE_MODELS for message in (*pair.chosen, *pair.rejected))


def _lacks(text: str, parts: Iterator[str]) -> bool:
    squeezed = ""
    for part in parts:
        if part in text:
            continue
        squeezed = squeezed or "".join(text.split())
        if "".join(part.split()) not in squeezed:
            return True
    return False


def _parts(message: dict[str, Any]) -> Iterator[str]:
    for key in ("content", *_REASONING):
        if isinstance(message.get(key), str):
            yield message[key]
    yield from _names(message.get("tool_calls"))


def _names(functions: Any) -> Iterator[str]:
    """Of tools or calls, whether the function stands inside or is the object itself."""
    for item in functions if isinstance(functions, list) else []:
        inner = item.get("function", item) if isinstance(item, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str):
            yield name
