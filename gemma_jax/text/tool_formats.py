"""How tools, calls and results are written for a model: three formats with one interface.

- `json` and `python` are those of Google's guide for Gemma 3, which has no tokens for tools: the
  declarations go in front of the first user message, results come as a user message.
- `functiongemma` is that of FunctionGemma: declarations in a developer turn, texts between
  `<escape>`, calls and results between markers that are special tokens of its tokenizer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .tokenizer import Tokenizer
from .tool_calls import Answer, CallParser, ToolCall, collect
from .tool_keywords import ANNOTATIONS
from .tool_marker_reader import END_CALL, ESCAPE, START_CALL, MarkerReader
from .tool_readers import JsonReader, PythonReader, Reader
from .tools import Tool

START_RESULT, END_RESULT = "<start_function_response>", "<end_function_response>"
_START_TOOL, _END_TOOL = "<start_function_declaration>", "<end_function_declaration>"
BARE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}")
# Special tokens of Gemma's vocabularies: inside of calls and results they are text, and stay text.
_MARKER = re.compile(
    r"<(?=(?:(?:start|end)_(?:of_\w+|function_\w+)|bos|eos|pad|unk|mask|escape|unused\d+"
    r"|\w+_soft_token)>)"
)
FUNCTIONGEMMA_SENTENCE = "You are a model that can do function calling with the following functions"


@dataclass(frozen=True)
class ToolResult:
    """Holds what a tool returned.

    Attributes:
      name: The tool.
      content: A value of JSON, or a text.
      call_id: Of the call that it answers; "" where calls have none.
    """

    name: str
    content: object
    call_id: str = ""


@dataclass(frozen=True)
class ToolFormat:
    """Writes tools, calls and results, and reads calls.

    Attributes:
      name: "json", "python" or "functiongemma".
      declare: Tools -> the text that tells a model of them.
      write_calls, write_results: Calls or results -> text, for messages that were.
      reader: Its syntax.
      opening: What a call begins with.
      markers: Special tokens that the text of an answer must show for calls to be found.
      stops: What ends an answer besides the tokenizer's stop tokens.
      role: Whose turn the declarations belong to: "user", in front of its text, or "developer".
    """

    name: str
    declare: Callable[[Sequence[Tool]], str]
    write_calls: Callable[[Sequence[ToolCall]], str]
    write_results: Callable[[Sequence[ToolResult]], str]
    reader: type[Reader]
    opening: str
    markers: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    role: str = "user"

    def parser(self, tools: Sequence[Tool] = ()) -> CallParser:
        """A parser for a text that comes in pieces."""
        return CallParser(self.reader, {tool.name: tool.parameter_names for tool in tools})

    def parse(self, text: str, tools: Sequence[Tool] = ()) -> Answer:
        """Takes a whole answer apart.

        Examples:
          >>> from gemma_jax.text.tool_formats import JSON
          >>> JSON.parse('Wait. {"name": "now", "parameters": {"zone": "UTC"}}').calls
          ()
          >>> JSON.parse('Wait.\\n{"name": "now", "parameters": {"zone": "UTC"}}').calls
          (ToolCall(name='now', arguments={'zone': 'UTC'}, id=''),)
        """
        parser = self.parser(tools)
        return collect([*parser.feed(text), *parser.close()])


def _json(value: object) -> str:
    """JSON text in which no special token stands."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected values of JSON in calls and results: {error}") from None
    return _MARKER.sub(r"\\u003c", text)


def _declare_in_json(call: str) -> Callable[[Sequence[Tool]], str]:
    def declare(tools: Sequence[Tool]) -> str:
        listed = json.dumps([tool.bare for tool in tools], ensure_ascii=False, indent=1)
        return (
            "You have access to functions. If you decide to invoke any of the function(s), you "
            f"MUST put it in the format of\n{call}\n\n"
            "You SHOULD NOT include any other text in the response if you call a function\n"
            f"{listed}"
        )

    return declare


def _json_calls(calls: Sequence[ToolCall]) -> str:
    texts = [_json({"name": call.name, "parameters": dict(call.arguments)}) for call in calls]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _fenced_results(results: Sequence[ToolResult]) -> str:
    texts = [_json({"name": result.name, "result": result.content}) for result in results]
    return "\n".join(f"```tool_output\n{text}\n```" for text in texts)


def _python_calls(calls: Sequence[ToolCall]) -> str:
    return f"[{', '.join(f'{call.name}({_python_arguments(call.arguments)})' for call in calls)}]"


def _python_arguments(arguments: Mapping[str, object]) -> str:
    return ", ".join(
        f"{key}={python_value(value)}"
        if BARE_NAME.fullmatch(key)
        else f"**{{{_json(key)}: {python_value(value)}}}"
        for key, value in arguments.items()
    )


def python_value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_json(str(k))}: {python_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(python_value, value))}]"
    return _json(value)


def _functiongemma_declaration(tools: Sequence[Tool]) -> str:
    return "".join(
        f"{_START_TOOL}declaration:{tool.name}{marked_value(_declared(tool))}{_END_TOOL}"
        for tool in tools
    )


def _declared(tool: Tool) -> dict:
    return {"description": tool.description, "parameters": _said(tool.parameters, tool.name)}


def _said(schema: Mapping, where: str) -> dict:
    """A JSON schema as FunctionGemma says it: without annotations other than the description.

    Raises:
      ValueError: It says what that format cannot.
    """
    said = {}
    for key, value in sorted(schema.items()):
        if key == "properties":
            said[key] = {k: _said(v, f"{where}.{k}") for k, v in sorted(value.items())}
        elif key == "items":
            said[key] = _said(value, f"{where}[]")
        elif key == "type" and isinstance(value, str):
            said[key] = value.upper()
        elif key in ("description", "enum", "required", "nullable"):
            said[key] = value
        elif key == "additionalProperties" and value is False:
            continue  # a declaration lists all there are
        elif key not in ANNOTATIONS:
            raise ValueError(
                f"the format functiongemma cannot say {key!r} of {where}; use the format json"
            )
    return said


def marked_value(value: object) -> str:
    """A value in FunctionGemma's notation."""
    if isinstance(value, str):
        return f"{ESCAPE}{_without_markers(value)}{ESCAPE}"
    if isinstance(value, Mapping):
        pairs = (
            f"{k if BARE_NAME.fullmatch(k) else marked_value(k)}:{marked_value(v)}"
            for k, v in value.items()
        )
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(marked_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected values of JSON in calls and results, got {value}")
    return _json(value)


def _without_markers(text: str) -> str:
    if found := _MARKER.search(text):
        raise ValueError(
            f"the format functiongemma cannot say a text with the special token "
            f"{text[found.start() :].split('>')[0]}>; take it out, or use the format json"
        )
    return text


def _functiongemma_calls(calls: Sequence[ToolCall]) -> str:
    return "".join(
        f"{START_CALL}call:{call.name}{marked_value(dict(sorted(call.arguments.items())))}{END_CALL}"
        for call in calls
    )


def _functiongemma_results(results: Sequence[ToolResult]) -> str:
    return "".join(
        f"{START_RESULT}response:{result.name}{marked_value(_as_object(result.content))}{END_RESULT}"
        for result in results
    )


def _as_object(content: object) -> object:
    return content if isinstance(content, Mapping) else {"result": content}


JSON = ToolFormat(
    "json",
    _declare_in_json(
        '{"name": function name, "parameters": dictionary of argument name and its value}, or '
        "of several a list [{...}, {...}]"
    ),
    _json_calls,
    _fenced_results,
    JsonReader,
    '{"name": "',
)
PYTHON = ToolFormat(
    "python",
    _declare_in_json(
        "[func_name1(params_name1=params_value1, params_name2=params_value2...), "
        "func_name2(params)]"
    ),
    _python_calls,
    _fenced_results,
    PythonReader,
    "[",
)
FUNCTIONGEMMA = ToolFormat(
    "functiongemma",
    _functiongemma_declaration,
    _functiongemma_calls,
    _functiongemma_results,
    MarkerReader,
    START_CALL,
    markers=(START_CALL, END_CALL, ESCAPE, START_RESULT, END_RESULT, _START_TOOL, _END_TOOL),
    stops=(START_RESULT,),
    role="developer",
)
FORMATS = {each.name: each for each in (JSON, PYTHON, FUNCTIONGEMMA)}


def tool_format(name: str) -> ToolFormat:
    """A format by its name.

    Raises:
      ValueError: There is none of this name.
    """
    if name not in FORMATS:
        raise ValueError(f"expected a tool format of {list(FORMATS)}, got {name!r}")
    return FORMATS[name]


def marker_ids(tokenizer: Tokenizer, names: Sequence[str]) -> dict[str, int]:
    """Ids of those markers that a tokenizer has as one piece each, special tokens or not.

    Examples:
      >>> import gemma_jax as gj
      >>> from gemma_jax.text.tool_formats import FUNCTIONGEMMA, marker_ids
      >>> marker_ids(gj.load_tokenizer("checkpoints/digits"), FUNCTIONGEMMA.markers)
      {}
    """
    found = {name: tokenizer.encode(name) for name in names}
    unknown = tokenizer.unk_id
    return {name: ids[0] for name, ids in found.items() if len(ids) == 1 and ids[0] != unknown}
