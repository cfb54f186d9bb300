"""Arguments of a call, checked against a tool's declaration and made into Python's values."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Mapping

from .tools import Tool

_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": Mapping,
}


def check_arguments(tool: Tool, arguments: Mapping[str, object]) -> None:
    """Checks types, choices, names, and that nothing is missing.

    Raises:
      ValueError: One line on the first argument that is wrong.

    Examples:
      >>> from gemma_jax.text.tools import Tool
      >>> def wait(seconds: int): ...
      >>> check_arguments(Tool.from_function(wait), {"seconds": "9"})
      Traceback (most recent call last):
      ValueError: expected seconds of wait to be of type integer, got '9'
    """
    schema = {"type": "object", "additionalProperties": False, **tool.parameters}
    _check(schema, arguments, "", tool.name)


def _check(schema: Mapping, value: object, path: str, name: str) -> None:
    where = f"{path or 'the arguments'} of {name}"
    if value is None and schema.get("nullable"):
        return
    if any(options := [schema.get("anyOf") or schema.get("oneOf") or ()]) and options[0]:
        _check_any(options[0], value, path, name)
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise ValueError(f"expected {where} to be of type {' or '.join(kinds)}, got {value!r:.80}")
    if "enum" in schema and not any(_same(value, each) for each in schema["enum"]):
        raise ValueError(f"expected {where} to be one of {schema['enum']}, got {value!r:.80}")
    if isinstance(value, Mapping):
        _check_object(schema, value, path, name)
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for i, item in enumerate(value):
            _check(schema["items"], item, f"{path}[{i}]", name)


def _check_any(options: typing.Sequence[Mapping], value: object, path: str, name: str) -> None:
    reasons = []
    for option in options:
        try:
            return _check(option, value, path, name)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; or ".join(reasons))


def _check_object(schema: Mapping, value: Mapping, path: str, name: str) -> None:
    inner = schema.get("properties", {})
    if missing := [key for key in schema.get("required", ()) if key not in value]:
        raise ValueError(f"expected {missing} in {path or 'the arguments'} of {name}")
    others = schema.get("additionalProperties", True)
    for key, each in value.items():
        if key not in inner and others is False:
            raise ValueError(f"{name} has no {key!r}, only {list(inner)}")
        part = inner.get(key, others if isinstance(others, Mapping) else {})
        _check(part, each, f"{path}.{key}" if path else key, name)


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, object))


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def call_with(tool: Tool, arguments: Mapping[str, object]) -> object:
    """Checks the arguments and calls the tool's function with them.

    Raises:
      ValueError: See `check_arguments`; a tool without a function. Whatever the function raises.
    """
    if tool.function is None:
        raise ValueError(f"the tool {tool.name} is a declaration alone, without a function")
    check_arguments(tool, arguments)
    hints = typing.get_type_hints(tool.function)
    return tool.function(**{key: _made(hints.get(key), each) for key, each in arguments.items()})


def _made(hint: object, value: object) -> object:
    """The value as the hint has it: dataclasses, enums and whole numbers."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{key: _made(hints.get(key), each) for key, each in value.items()})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if hint is int and isinstance(value, float):
        return int(value)
    if isinstance(value, list) and inner and origin is not typing.Union:
        made = [_made(inner[0], each) for each in value]
        return tuple(made) if origin is tuple else made
    given = [each for each in inner if each is not type(None)]
    if value is not None and origin is not typing.Literal and len(given) == 1 != len(inner):
        return _made(given[0], value)
    return value
