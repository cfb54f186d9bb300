"""JSON schemas of Python functions, from their type hints and docstrings."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def descriptions_of(docstring: str) -> tuple[str, dict[str, str]]:
    """What stands in front of the sections, and the texts under `Args:`."""
    head, _, rest = docstring.partition("\nArgs:\n")
    head = re.split(r"\n(?:Returns|Raises|Yields|Examples?|Note|Attributes):\n", head)[0]
    section = re.split(r"\n(?=\S)", "\n" + rest)[0] if not rest.startswith("\n") else ""
    found: dict[str, str] = {}
    lines = [line for line in section.splitlines() if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    key = ""
    for line in lines:
        entry = re.match(r"\*{0,2}(\w+)(?: *\([^)]*\))?: *(.*)", line[indent:])
        if entry and line[indent : indent + 1].strip():
            key = entry[1]
            found[key] = entry[2].strip()
        elif key:
            found[key] = f"{found[key]} {line.strip()}".strip()
    return head.strip(), found


def schema_of(function: Callable, descriptions: Mapping[str, str]) -> dict[str, object]:
    """The JSON schema of a function's parameters.

    Raises:
      ValueError: A parameter that JSON cannot give.
    """
    name = getattr(function, "__name__", "the function")
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{name} takes {key!r} without a name, which no call can say")
        if key not in hints:
            raise ValueError(f"expected a type for {key!r} of {name}")
        schema = schema_of_type(hints[key], f"{key!r} of {name}")
        if key in descriptions:
            schema["description"] = descriptions[key]
        if parameter.default is parameter.empty:
            required.append(key)
        elif isinstance(parameter.default, (str, int, float, bool)):
            schema["default"] = parameter.default
        properties[key] = schema
    return {"type": "object", "properties": properties, "required": required}


def schema_of_type(hint: object, where: str) -> dict[str, object]:
    """The JSON schema of a type.

    Raises:
      ValueError: JSON has no such type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if hint is typing.Any:
        return {}
    if origin is typing.Annotated:
        return schema_of_type(inner[0], where)
    if origin is typing.Literal:
        return _choice(inner, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice([each.value for each in hint], where)
    if origin in (typing.Union, types.UnionType):
        return _union(inner, where)
    if hint in (list, tuple, Sequence) or origin in (list, Sequence):
        return {"type": "array"} | ({"items": schema_of_type(inner[0], where)} if inner else {})
    if origin is tuple and len(inner) == 2 and inner[1] is ...:
        return {"type": "array", "items": schema_of_type(inner[0], where)}
    if hint in (dict, Mapping) or (origin in (dict, Mapping) and inner[0] is str):
        values = {"additionalProperties": schema_of_type(inner[1], where)} if inner else {}
        return {"type": "object"} | values
    if dataclasses.is_dataclass(hint):
        fields = dataclasses.fields(hint)
        none = dataclasses.MISSING
        needed = [f.name for f in fields if f.default is none and f.default_factory is none]
        return _object(hint, needed, where)
    if typing.is_typeddict(hint):
        return _object(hint, sorted(hint.__required_keys__), where)
    raise ValueError(f"expected a type that JSON has for {where}, got {hint!r:.200}")


def _choice(values: Sequence[object], where: str) -> dict[str, object]:
    kinds = {_PLAIN.get(type(value)) for value in values}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"expected choices of one type that JSON has for {where}")
    return {"type": kinds.pop(), "enum": list(values)}


def _union(inner: Sequence[object], where: str) -> dict[str, object]:
    given = [each for each in inner if each is not type(None)]
    if len(given) == 1:
        return schema_of_type(given[0], where) | {"nullable": True}
    schemas = [schema_of_type(each, where) for each in inner]
    return {"anyOf": schemas}


def _object(hint: type, required: Sequence[str], where: str) -> dict[str, object]:
    hints = typing.get_type_hints(hint)
    properties = {key: schema_of_type(hints[key], f"{key!r} in {where}") for key in hints}
    return {"type": "object", "properties": properties, "required": list(required)}
