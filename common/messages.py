"""Messages and tools in every form that people have them, as chat templates want them.

A message is `{"role", "content"}` and whatever else a template may render: `tool_calls`, `tool_call_id`,
`name`, `reasoning_content`, … A field that is null is a field that is not there: tables fill in what other
rows have.
"""

import json
import math

from common.cli import UserError

ASKING = ("user", "tool", "function", "ipython")  # whose turn may be the last one of a prompt
CALLS = ("tool_calls", "function_call")  # with them an assistant's content may be null
SHAREGPT = {role: role for role in ("user", "assistant", "system", "tool")}
SHAREGPT |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def as_json(value: object) -> object:
    """A value of a table as JSON holds it: NaN and infinity are null, what JSON does not know is text."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def is_messages(value: object) -> bool:
    """Whether a value looks like a list of messages, ours or ShareGPT's."""
    listed = isinstance(value, list) and bool(value)
    return listed and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)


def text_of(message: dict) -> str:
    """The text of a message; empty where its content is null, beside tool calls."""
    return message.get("content") or ""


def to_messages(value: object, where: str) -> list[dict]:
    """A prompt as a list of messages whose last turn is the user's or a tool's.

    A string is one user turn; a trailing assistant turn is dropped (`messages` columns hold the answer too).
    ShareGPT's `from` and `value` are read, and content given as parts where all parts are text.

    Raises:
        UserError: not a prompt; `where` names the place.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: a prompt is a string or a list of messages, got {str(value)[:60]!r}")
    messages = [_to_message(message, where) for message in value]
    if messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] not in ASKING:
        raise UserError(f"{where}: the last turn of a prompt must be the user's, or a tool's")
    return messages


def _no_message(message, where):
    return UserError(f'{where}: a message is {{"role": …, "content": text}}, got {str(message)[:60]!r}')


def _to_message(message, where):
    if isinstance(message, dict) and "role" not in message and "from" in message:
        role = SHAREGPT.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise UserError(
                f'{where}: a turn is "from" {str(message["from"])[:40]!r}, which is not known; write it as '
                '{"role": …, "content": text}'
            )
        others = {key: item for key, item in message.items() if key not in ("from", "value")}
        message = {"role": role, "content": message.get("value")} | others
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _no_message(message, where)
    content = message.get("content")
    if isinstance(content, list):  # as templates write parts: nothing between them
        content = "".join(_text_of_part(part, where) for part in content)
    others = {key: as_json(item) for key, item in message.items() if item is not None and item != []}
    others = {key: item for key, item in others.items() if key not in ("role", "content")}
    if not isinstance(content, str) and not (content is None and any(others.get(key) for key in CALLS)):
        raise _no_message(message, where)
    known = {"role": message["role"]} | ({"content": content} if "content" in message else {})
    return known | others


def _text_of_part(part, where):
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in ("text", None) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(f"{where}: a turn holds a part of the type {str(kind)[:40]!r}; only text can be read")


def to_tools(value: object, where: str) -> list[dict] | None:
    """The `tools` of a record as a list of JSON schemas, or None; the list or a schema may be JSON text.

    Raises:
        UserError: something else; `where` names the place.
    """
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        if isinstance(value, list):
            value = [json.loads(tool) if isinstance(tool, str) else tool for tool in value]
    except (RecursionError, ValueError):
        pass
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        todo = "give a column of another meaning another name"
        raise UserError(f"{where}: `tools` must be a list of JSON schemas, got {str(value)[:60]!r}; {todo}")
    return as_json(value)
