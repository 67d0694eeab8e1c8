"""Chat messages as data sets have them, read into one shape: a role, text, and whatever the chat template may use.

Two dialects: {"role", "content"} as the OpenAI API has it, and ShareGPT's {"from", "value"}.
"""

import json
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

# who speaks in ShareGPT's dialect and its kin, in lower case -> the role that chat templates know
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "tool_calls"),
}


def read_messages(value: Any, name: str, remedy: str = "Write it as [{role, content}, ...].") -> list[Message]:
    """Messages of role and content.

    Args:
        value: what the record holds.
        name: its field, for messages.
        remedy: what to do where the value is no list.

    Raises:
        ValueError: it is not a list with at least one message, or a message lacks its role or text.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: expected a list of messages, got {described(value)}. {remedy}")
    return [_read_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def read_turns(value: Any, name: str) -> list[Message]:
    """Messages of from and value, ShareGPT's dialect; one alone need not be in a list.

    Raises:
        ValueError: it is neither a turn nor a list of turns, or a turn's speaker is unknown or its value no text.
    """
    if isinstance(value, dict):
        return [_read_turn(value, name)]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{name}: expected a list of turns with the keys from and value, got {described(value)}. "
            "Fill the field or remove the record."
        )
    return [_read_turn(turn, f"{name}[{index}]") for index, turn in enumerate(value)]


NO_CHAT_TEMPLATE = (
    "processing_class: expected a tokenizer with a chat template, since the pairs are messages, got one without. Give "
    "one with chat_template_path (zephyr for a base model, chatml, a .jinja file, a chat model to take it from, or the "
    "template itself), set tokenizer.chat_template, take the chat model's tokenizer, or write the pairs as text."
)

# of transformers' apply_chat_template: what is no variable of a template, and how answers are told from prompts
TEMPLATE_ARGUMENTS = frozenset(
    {
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


def read_template_options(record: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is called with besides the messages: the fields `tools` and `chat_template_kwargs`.

    Raises:
        ValueError: `tools` is neither a list nor the JSON of one, or `chat_template_kwargs` is no object, or holds what
            is no variable of a template.
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools: expected a list or its JSON, got {described(tools)}. Correct or empty the field.")
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(
            f"chat_template_kwargs: expected an object, got {described(options)}. Correct or empty the field."
        )
    fixed = sorted(TEMPLATE_ARGUMENTS & options.keys())
    if fixed:
        raise ValueError(
            f"chat_template_kwargs: expected variables of the chat template, got {fixed[0]!r}, by which "
            "a record would be rendered in another way than the others. Remove it."
        )
    # null for an empty list: some templates write tool instructions for that too
    return {"tools": tools or None, **options}


def described(value: Any) -> str:
    """A value's type and its beginning, for messages."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _read_message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        has_calls = isinstance(message, dict) and message.get("tool_calls") and "role" in message
        # of a message without content Arrow's null is left out, and nothing but its role stays
        is_empty = isinstance(message, dict) and message.keys() == {"role"}
        if not (has_calls or is_empty):
            got = f"the keys {sorted(map(str, message))}" if isinstance(message, dict) else described(message)
            raise ValueError(f"{name}: expected a message with the keys role and content, got {got}. Rename its keys.")
    if not isinstance(message["role"], str) or not message["role"]:
        raise ValueError(f"{name}.role: expected text, got {described(message['role'])}. Name who speaks.")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(
            f"{name}.tool_calls: expected a list of calls, got {described(calls)}. Write [{{function: {{name, "
            "arguments}}, ...]."
        )
    # Arrow gives every message every key that any message has; templates take a null key for a present one
    kept = {key: value for key, value in message.items() if value is not None}
    if calls and "content" not in kept:  # a turn that calls a tool and says nothing: some would write "None"
        return kept
    return {**kept, "content": _read_content(message.get("content"), f"{name}.content")}


def _read_content(content: Any, name: str) -> str:
    """Text, or a list of parts of type text, which are put together."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{name}: expected text, got {described(content)}. Only text can be trained on.")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            got = f"type {part.get('type')!r}" if isinstance(part, dict) else described(part)
            raise ValueError(f"{name}[{index}]: expected a part of type text, got {got}. Only text can be trained on.")
        texts.append(text)
    return "".join(texts)


def _read_turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        got = f"the keys {sorted(map(str, turn))}" if isinstance(turn, dict) else described(turn)
        raise ValueError(f"{name}: expected a turn with the keys from and value, got {got}. Rename its keys.")
    speaker = turn["from"]
    role = SHAREGPT_ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(
            f"{name}.from: expected one of {', '.join(SHAREGPT_ROLES)}, got {described(speaker)}. Rename the speaker."
        )
    content = _read_content(turn["value"], f"{name}.value")
    if role == "tool_calls":
        return {"role": "assistant", "content": "", "tool_calls": _read_calls(content, f"{name}.value")}
    return {"role": role, "content": content}


def _read_calls(text: str, name: str) -> list[dict[str, Any]]:
    """The JSON of one call {name, arguments} or of a list of calls, as chat templates take them."""
    calls = _parsed(text, name)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(
                f"{name}: expected the JSON of a tool call with the keys name and arguments, got {described(call)}. "
                "Correct the call, or call the turn gpt if it is plain text."
            )
    if not calls:
        raise ValueError(f"{name}: expected the JSON of at least one tool call, got {text!r}. Remove the turn.")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments") or {}}}
        for call in calls
    ]


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}: expected a list or its JSON, got {described(text)} ({error}). Correct the field."
        ) from error
