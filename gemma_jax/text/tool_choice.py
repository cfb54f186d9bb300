"""Grammars of calls: what a model may write where it must call a tool.

They are Lark texts in the dialect of llguidance, where rules may hold JSON schemas (`%json {...}`)
and special tokens (`<escape>`). Nothing here needs llguidance itself.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence

from .tool_call_rules import (
    FUNCTIONGEMMA_STYLE,
    PYTHON_STYLE,
    ValueRules,
    json_rule,
    quoted,
    schema_rule,
)
from .tool_formats import FUNCTIONGEMMA, PYTHON, ToolFormat
from .tool_marker_reader import END_CALL, START_CALL
from .tools import Tool

Choice = str | Mapping[str, object]
Rules = dict[str, str]


def call_grammar(
    tools: Sequence[Tool], choice: Choice, format: ToolFormat, *, parallel: bool = True
) -> str | None:
    """The grammar of an answer that calls tools, in the layout of `ToolFormat.write_calls`.

    Arguments come in the order of the declaration (functiongemma: sorted by name). In the formats
    python and functiongemma an object that declares names has these alone. The grammar of
    functiongemma speaks of special tokens, so it needs a vocabulary whose constraints know these. A
    number beyond the range of floats, and a name that comes twice in an object of free names, fit
    the grammars, and the parser refuses them.

    Args:
      tools: That were declared.
      choice: `"none"`, `"auto"`, `"required"`, or one tool as OpenAI's API names it: `{"type":
        "function", "function": {"name": ...}}` or `{"type": "function", "name": ...}`.
      format: In which calls are written.
      parallel: Whether there may be several calls.

    Returns:
      The grammar, in Lark; `None` for "none" and "auto", which leave the text free.

    Raises:
      ValueError: Another choice, a tool that there is not, no tools; a schema that asks for what
        the grammar of this format cannot hold, by the keyword's name.

    Examples:
      >>> from gemma_jax.text.tool_formats import PYTHON
      >>> now = Tool("now", "", {"properties": {"zone": {"enum": ["UTC", "CET"]}}})
      >>> print(call_grammar([now], "required", PYTHON, parallel=False))
      start: "[" call "]"
      call: call_0
      call_0: "now(" call_0_1_first_0 ")"
      call_0_value_0: "\\"UTC\\"" | "\\"CET\\""
      call_0_1_first_0: "zone=" call_0_value_0 | ""
    """
    chosen = chosen_tools(tools, choice)
    if chosen is None:
        return None
    write, start = _WRITERS[format.name]
    return _text({"start": start(parallel), **_call_rules(chosen, write)})


def call_or_answer_grammar(
    tools: Sequence[Tool],
    schema: Mapping[str, object],
    format: ToolFormat,
    *,
    parallel: bool = True,
) -> str:
    """The grammar of an answer that is either calls of tools or JSON of a schema.

    What could be both is a call to whoever reads it.

    Args:
      tools: At least one; see `call_grammar`.
      schema: Of the answer.
      format: functiongemma or json.

    Raises:
      ValueError: The format python; as `call_grammar`; in the format json, parameters that refer
        to themselves as a whole (`"#"`).

    Examples:
      >>> from gemma_jax.text.tool_formats import FUNCTIONGEMMA
      >>> grammar = call_or_answer_grammar([Tool("now")], {"type": "null"}, FUNCTIONGEMMA)
      >>> grammar.splitlines()[:2]
      ['start: calls | answer', 'calls: call+']
    """
    write, start = _WRITERS[format.name]
    if format.name == PYTHON.name:
        raise ValueError(f"no answer stands beside calls in the format {format.name}; use json")
    if format.name == "json":
        write = _json_call_by_parts
    rules = {"start": "calls | answer", "calls": start(parallel), "answer": schema_rule(schema)}
    return _text(rules | _call_rules(tools, write))


def _call_rules(tools: Sequence[Tool], write: _Writer) -> Rules:
    names = [f"call_{i}" for i in range(len(tools))]
    rules: Rules = {"call": " | ".join(names)}
    for name, tool in zip(names, tools, strict=True):
        try:
            write(tool, name, rules)
        except RecursionError:
            raise ValueError(f"the schema of {tool.name} is nested too deep") from None
    return rules


def _text(rules: Rules) -> str:
    return "\n".join(f"{name}: {body}" for name, body in rules.items())


def triggered_grammar(tools: Sequence[Tool], format: ToolFormat) -> str:
    """The grammar of an answer whose text is free, but for calls: those fit their schemas.

    A call begins with FunctionGemma's marker, or in JSON with the name of one of these tools.

    Args:
      tools: Whose calls are to fit; at least one.
      format: functiongemma (with all tools that were declared) or json.

    Raises:
      ValueError: The format python, whose calls begin like any text; as `call_grammar`.

    Examples:
      >>> from gemma_jax.text.tool_formats import FUNCTIONGEMMA
      >>> print(triggered_grammar([Tool("now")], FUNCTIONGEMMA))
      start: (FREE? call)* FREE?
      FREE: /(?s:.+)/
      call: call_0
      call_0: <start_function_call> "call:now{" "" "}" <end_function_call>
    """
    rules: Rules = {"start": "(FREE? call)* FREE?", "FREE": "/(?s:.+)/"}
    if format.name == FUNCTIONGEMMA.name:
        calls = call_grammar(tools, "required", format) or ""
        rules |= dict(line.split(": ", 1) for line in calls.splitlines()[1:])
    elif format.name == "json":
        rules["start"] = "call* FREE?"
        rules["call"] = " | ".join(f"call_{i}" for i in range(len(tools)))
        for i, tool in enumerate(tools):
            rules |= _triggered_json(tool, f"call_{i}")
    else:
        raise ValueError(f"text is not free beside calls in the format {format.name}; use json")
    return _text(rules)


def _triggered_json(tool: Tool, name: str) -> Rules:
    space = r"[ \t\n]*"
    head = rf'(?s:.*)\{{{space}"name"{space}:{space}"{re.escape(tool.name)}"'
    return {
        f"{name}_head[lazy]": f"/{head}/",
        name: f'{name}_head ", \\"parameters\\": " {name}_parameters "}}"',
        f"{name}_parameters": json_rule(_closed(tool)),
    }


def chosen_tools(tools: Sequence[Tool], choice: Choice) -> tuple[Tool, ...] | None:
    """The tools of which one must be called; `None` if none must.

    Raises:
      ValueError: See `call_grammar`.
    """
    if isinstance(choice, str) and choice in ("none", "auto"):
        return None
    if isinstance(choice, str) and choice == "required":
        if not tools:
            raise ValueError("tool_choice is 'required', but there are no tools")
        return tuple(tools)
    name = _named(choice)
    if name is None:
        raise ValueError(
            "expected tool_choice to be 'none', 'auto', 'required' or {'type': 'function', "
            f"'function': {{'name': ...}}}}, got {choice!r:.200}"
        )
    for tool in tools:
        if tool.name == name:
            return (tool,)
    names = [tool.name for tool in tools]
    near = difflib.get_close_matches(name, names, 1, 0)
    hint = f"did you mean {near[0]!r}?" if near else "there are no tools"
    raise ValueError(f"tool_choice names {name!r:.200}, which is no tool; {hint}")


def _named(choice: Choice) -> str | None:
    """The tool's name in an object that has nothing else."""
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        return None
    inner = choice.get("function", choice)
    known = {"name"} if "function" in choice else {"type", "name"}
    outer = {"type", "function"} if "function" in choice else known
    if not isinstance(inner, Mapping) or inner.keys() != known or choice.keys() != outer:
        return None
    return inner["name"] if isinstance(inner["name"], str) else None


def _json_call(tool: Tool, name: str, rules: Rules) -> None:
    opening = quoted(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
    rules[name] = f'{opening} {name}_parameters "}}"'
    rules[f"{name}_parameters"] = json_rule(_closed(tool))


def _json_call_by_parts(tool: Tool, name: str, rules: Rules) -> None:
    """In the words that any JSON is made of: after a longer one no other answer could follow."""
    parameters = _closed(tool)
    kept = {key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters}
    if _refers_to_root(parameters | kept):
        raise ValueError(f"the parameters of {tool.name} refer to '#'; name what it means in $defs")
    rules[name] = json_rule(
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": parameters},
            "required": ["name", "parameters"],
            "additionalProperties": False,
            **kept,
        }
    )


def _refers_to_root(schema: object) -> bool:
    if isinstance(schema, Mapping):
        return schema.get("$ref") == "#" or any(map(_refers_to_root, schema.values()))
    return isinstance(schema, list) and any(map(_refers_to_root, schema))


def _python_call(tool: Tool, name: str, rules: Rules) -> None:
    values = ValueRules(PYTHON_STYLE, tool, name, rules)
    rules[name] = ""
    body = values.entries(_closed(tool), tool.name, values.argument)
    rules[name] = f'{quoted(f"{tool.name}(")} {body} ")"'


def _functiongemma_call(tool: Tool, name: str, rules: Rules) -> None:
    FUNCTIONGEMMA.declare([tool])  # refuses what the format cannot say
    values = ValueRules(FUNCTIONGEMMA_STYLE, tool, name, rules)
    rules[name] = ""
    schema = _closed(tool)
    schema["properties"] = dict(sorted(schema.get("properties", {}).items()))
    body = values.entries(schema, tool.name, values.pair)
    rules[name] = f'{START_CALL} {quoted(f"call:{tool.name}{{")} {body} "}}" {END_CALL}'


def _closed(tool: Tool) -> dict[str, object]:
    """The parameters; names that are not declared are refused where nothing else is said."""
    return {"type": "object", "additionalProperties": False, **tool.parameters}


def _json_start(parallel: bool) -> str:
    return 'call | "[" call (", " call)* "]"' if parallel else "call"


def _python_start(parallel: bool) -> str:
    return '"[" call (", " call)* "]"' if parallel else '"[" call "]"'


def _functiongemma_start(parallel: bool) -> str:
    return "call+" if parallel else "call"


_Writer = Callable[[Tool, str, Rules], None]
_WRITERS: Mapping[str, tuple[_Writer, Callable[[bool], str]]] = {
    "json": (_json_call, _json_start),
    PYTHON.name: (_python_call, _python_start),
    FUNCTIONGEMMA.name: (_functiongemma_call, _functiongemma_start),
}
