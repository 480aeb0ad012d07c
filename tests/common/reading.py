"""What the tests of records share: files to write, and how they are refused."""

import json

import pytest

from common.cli import UserError
from common.records import PromptArguments, read_prompts

FUNCTION = {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}
CALL = {"id": "c1", "type": "function", "function": FUNCTION}
TALK = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
]


def tool(name, key):
    """The schema of a function with one text as its parameter."""
    parameters = {"type": "object", "properties": {key: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", "city")]


def user(text):
    return [{"role": "user", "content": text}]


def write(path, *rows, end="\n"):
    """JSON Lines of rows, or of lines as they are; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text + end, encoding="utf-8", newline="\n")
    return str(path)


def prompts_of(name, keep_bad=False, **how):
    """The records of a prompt file; `how`: PromptArguments."""
    return read_prompts(str(name), PromptArguments(**how), keep_bad)


def refusal(name, *words, read=prompts_of, **more):
    """What is said of records that are refused: one line, which has all the words."""
    with pytest.raises(UserError) as caught:
        list(read(str(name), **more))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message
