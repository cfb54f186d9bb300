"""Conversations with tools as conversations that a template can carry.

Gemma 3 has no role for tools: declarations go in front of the first user message (behind a system
message), calls are the text of an assistant message, results are a user message. FunctionGemma has
a developer turn, and takes results inside of the model's turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .chat import BOS, END_OF_TURN, GENERATION_PROMPT, Message, render_turn
from .tool_calls import ToolCall
from .tool_formats import FUNCTIONGEMMA_SENTENCE, ToolFormat, ToolResult
from .tools import Tool


def with_tools(
    messages: Sequence[Message], tools: Sequence[Tool], format: ToolFormat
) -> list[Message]:
    """The same conversation with user and assistant messages alone, and a system message in front.

    Args:
      messages: Also `{"role": "assistant", "tool_calls": [...]}` and `{"role": "tool",
        "tool_call_id": ..., "content": ...}`, as OpenAI's API has them.
      format: One whose declarations belong to the user's turn.

    Raises:
      ValueError: A result without a call, calls that cannot be read, a format that needs
        `render_functiongemma`.

    Examples:
      >>> from gemma_jax.text.tool_formats import PYTHON
      >>> call = {"id": "1", "function": {"name": "now", "arguments": "{}"}}
      >>> for message in with_tools([
      ...     {"role": "user", "content": "What time is it?"},
      ...     {"role": "assistant", "tool_calls": [call]},
      ...     {"role": "tool", "tool_call_id": "1", "content": "noon"},
      ... ], [], PYTHON): print(message["role"], repr(message["content"]))
      user 'What time is it?'
      assistant '[now()]'
      user '```tool_output\\n{"name": "now", "result": "noon"}\\n```'
    """
    if format.role != "user":
        raise ValueError(f"the format {format.name} has turns of its own: render_functiongemma")
    plain: list[dict[str, object]] = []
    names: dict[str, str] = {}
    for message in messages:
        message = _without_tools(message, names, format)
        if plain and message["role"] == "user" and plain[-1]["role"] == "user":
            plain[-1]["content"] = _beside(plain[-1]["content"], message["content"])
        else:
            plain.append(dict(message))
    if not tools:
        return plain
    declared = format.declare(tools)
    if plain and plain[0]["role"] == "system":
        plain[0]["content"] = f"{_text(plain[0])}\n\n{declared}"
        return plain
    return [{"role": "system", "content": declared}, *plain]


def _without_tools(
    message: Message, names: dict[str, str], format: ToolFormat
) -> Mapping[str, object]:
    role = message.get("role")
    if role == "tool":
        return {"role": "user", "content": format.write_results([result_of(message, names)])}
    calls = calls_of(message)
    names.update({call.id: call.name for call in calls})
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    text, written = _text(message).strip(), format.write_calls(calls)
    return {"role": "assistant", "content": f"{text}\n{written}" if text else written}


def _beside(content: object, more: object) -> object:
    """Two contents as one, each on lines of its own."""
    if isinstance(content, str) and isinstance(more, str):
        return f"{content}\n{more}"
    items = [each if isinstance(each, list) else [each] for each in (content, more)]
    return [*items[0], *items[1]]


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        raise ValueError(
            f"expected one text in a {message.get('role')} message beside tools, "
            f"got {content!r:.200}"
        )
    return content


def calls_of(message: Message) -> list[ToolCall]:
    """The calls of an assistant message, as OpenAI's API has them.

    Raises:
      ValueError: They are not of that form.
    """
    calls = []
    for call in message.get("tool_calls") or ():
        inner = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise ValueError(
                "expected tool_calls like {'id': ..., 'function': {'name': ..., 'arguments': "
                f"...}}}}, got {call!r:.200}"
            )
        arguments = inner.get("arguments") or {}
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, Mapping):
            raise ValueError(f"expected the arguments of {inner['name']} to be an object of JSON")
        calls.append(ToolCall(inner["name"], arguments, str(call.get("id") or "")))
    return calls


def result_of(message: Message, names: Mapping[str, str]) -> ToolResult:
    """What a message of role "tool" tells.

    Raises:
      ValueError: Nobody knows of which tool.
    """
    call_id = str(message.get("tool_call_id") or "")
    name = names.get(call_id) or message.get("name")
    if not isinstance(name, str):
        raise ValueError(
            f"expected a tool message to answer a call: {call_id!r} is none of {list(names)}"
        )
    content = message.get("content")
    if isinstance(content, str):
        try:
            read = json.loads(content)
        except (ValueError, RecursionError):
            read = content
        content = read if isinstance(read, (dict, list)) else content
    return ToolResult(name, content, call_id)


def render_functiongemma(
    messages: Sequence[Message], tools: Sequence[Tool], format: ToolFormat
) -> str:
    """The prompt of a conversation with tools, as FunctionGemma reads it, beginning with "<bos>".

    Raises:
      ValueError: Roles out of turn; see `with_tools`.
    """
    messages, names = list(messages), {}
    system = ""
    if messages and messages[0].get("role") in ("system", "developer"):
        system = _text(messages.pop(0)).strip()
    lines = [line for line in (system, FUNCTIONGEMMA_SENTENCE) if line]
    head = "\n".join(dict.fromkeys(lines)) + format.declare(tools) if tools else system
    text = BOS + (f"<start_of_turn>developer\n{head}{END_OF_TURN}" if head else "")
    is_open = False  # whether the model's turn goes on
    for message in messages:
        role = message.get("role")
        calls = calls_of(message)
        names.update({call.id: call.name for call in calls})
        if role == "tool" and is_open:
            text += format.write_results([result_of(message, names)])
        elif calls or (role in ("assistant", "model") and is_open):
            text += "" if is_open else GENERATION_PROMPT
            text += _text(message).strip() + (format.write_calls(calls) if calls else "")
            is_open = bool(calls)
            text += "" if is_open else END_OF_TURN
        elif role == "tool" or is_open:
            raise ValueError(f"expected results right after the calls, got a {role!r} message")
        else:
            text += render_turn(message)
    return text if is_open else text + GENERATION_PROMPT
