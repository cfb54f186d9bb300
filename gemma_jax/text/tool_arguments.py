"""Arguments of a call, checked against a tool's declaration and made into Python's values."""

from __future__ import annotations

import dataclasses
import enum
import re
import typing
from collections.abc import Mapping, Sequence
from decimal import Decimal

from .tool_keywords import TEXT_FORMATS, resolve
from .tools import Tool

MAX_STEPS = 100_000
_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": Mapping,
}
_LIMITS = {
    "minimum": (lambda value, limit: value >= limit, "at least"),
    "maximum": (lambda value, limit: value <= limit, "at most"),
    "exclusiveMinimum": (lambda value, limit: value > limit, "more than"),
    "exclusiveMaximum": (lambda value, limit: value < limit, "less than"),
    "multipleOf": (
        lambda value, limit: Decimal(str(value)) % Decimal(str(limit)) == 0,
        "a multiple of",
    ),
}
_SIZES = {
    str: ("minLength", "maxLength", "characters"),
    list: ("minItems", "maxItems", "items"),
    Mapping: ("minProperties", "maxProperties", "entries"),
}


def check_arguments(tool: Tool, arguments: Mapping[str, object]) -> None:
    """Checks all that the declaration asks for: every keyword that `Tool` takes.

    Names that are not declared are refused unless the parameters' `additionalProperties` allows
    them. A `pattern` is searched by Python's `re`, so one from a stranger can cost much time.

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
    try:
        _Check(tool).apply(schema, arguments, "")
    except (_TooLong, RecursionError):
        raise ValueError(f"the arguments of {tool.name} take too long to check") from None


class _TooLong(Exception):
    """Alternatives in alternatives have multiplied."""


class _Check:
    """Checks values against the schemas of one tool."""

    def __init__(self, tool: Tool):
        self._name, self._root, self._steps = tool.name, tool.parameters, 0

    def apply(self, schema: Mapping, value: object, path: str) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _TooLong
        if value is None and schema.get("nullable"):
            return
        where = f"{path or 'the arguments'} of {self._name}"
        if "$ref" in schema:
            self.apply(resolve(schema["$ref"], self._root, where), value, path)
        for part in schema.get("allOf", ()):
            self.apply(part, value, path)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                self._one_of(schema[key], value, path, exactly=key == "oneOf")
        _check_plain(schema, value, where)
        if isinstance(value, Mapping):
            self._object(schema, value, path)
        if isinstance(value, list) and "items" in schema:
            for i, item in enumerate(value):
                self.apply(schema["items"], item, f"{path}[{i}]")

    def _one_of(self, options: Sequence[Mapping], value: object, path: str, exactly: bool) -> None:
        reasons = []
        for option in options:
            try:
                self.apply(option, value, path)
            except ValueError as error:
                reasons.append(str(error))
            else:
                if not exactly:
                    return
        if (fitting := len(options) - len(reasons)) > 1:
            where = f"{path or 'the arguments'} of {self._name}"
            raise ValueError(f"expected {where} to fit one of its schemas, not {fitting}")
        if not fitting:
            raise ValueError("; or ".join(reasons)[:500])

    def _object(self, schema: Mapping, value: Mapping, path: str) -> None:
        inner, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if missing := [key for key in schema.get("required", ()) if key not in value]:
            raise ValueError(f"expected {missing} in {path or 'the arguments'} of {self._name}")
        for key, each in value.items():
            if key not in inner and others is False:
                raise ValueError(f"{self._name} has no {key!r}, only {list(inner)}")
            part = inner.get(key, others if isinstance(others, Mapping) else {})
            self.apply(part, each, f"{path}.{key}" if path else key)


def _check_plain(schema: Mapping, value: object, where: str) -> None:
    """Checks the keywords that look no further than the value itself."""
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    got = f"got {value!r:.80}"
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise ValueError(f"expected {where} to be of type {' or '.join(kinds)}, {got}")
    if "enum" in schema and _key(value) not in map(_key, schema["enum"]):
        raise ValueError(f"expected {where} to be one of {schema['enum']!r:.300}, {got}")
    if "const" in schema and _key(value) != _key(schema["const"]):
        raise ValueError(f"expected {where} to be {schema['const']!r:.300}, {got}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for key, (fits, words) in _LIMITS.items():
            if key in schema and not fits(value, schema[key]):
                raise ValueError(f"expected {where} to be {words} {schema[key]}, {got}")
    for kind, (least, most, what) in _SIZES.items():
        if isinstance(value, kind) and len(value) < schema.get(least, 0):
            raise ValueError(f"expected {where} to have at least {schema[least]} {what}, {got}")
        if isinstance(value, kind) and len(value) > schema.get(most, len(value)):
            raise ValueError(f"expected {where} to have at most {schema[most]} {what}, {got}")
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        raise ValueError(f"expected {where} to match {schema['pattern']!r}, {got}")
    if isinstance(value, str) and "format" in schema:
        if not TEXT_FORMATS[schema["format"]].fullmatch(value):
            raise ValueError(f"expected {where} to be a {schema['format']}, {got}")
    if isinstance(value, list) and schema.get("uniqueItems"):
        if len(set(map(_key, value))) < len(value):
            raise ValueError(f"expected {where} to have every item once, {got}")


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _key(value: object) -> object:
    """The same for values that JSON Schema holds for equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, Mapping):
        return "object", frozenset((key, _key(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return "array", tuple(map(_key, value))
    return isinstance(value, bool), value


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
