"""Keywords of JSON Schema that the parameters of tools may use; any other is refused by name.

Every keyword here is checked in the arguments of a call (`tool_arguments.py`) or is a pure
annotation, which limits no value. `format` counts as a limit, for the names in `TEXT_FORMATS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated"}) | {
    "readOnly",
    "writeOnly",
    "$schema",
    "$comment",
}
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
DEEPEST = 64  # schemas in schemas
_DATE = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
TEXT_FORMATS = MappingProxyType(
    {
        name: re.compile(pattern, re.ASCII)
        for name, pattern in {
            "date": _DATE,
            "time": _TIME,
            "date-time": f"{_DATE}[tT]{_TIME}",
            "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
            "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
        }.items()
    }
)

Schema = Mapping[str, object]


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_type(value: object) -> bool:
    kinds = value if isinstance(value, (list, tuple)) else [value]
    return bool(kinds) and all(isinstance(kind, str) and kind in TYPES for kind in kinds)


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def _are_schemas(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


_NUMBER, _COUNT = ("a number", _is_number), ("a count", _is_count)
_OBJECT, _SCHEMAS = ("an object", _is_object), ("a list of schemas", _are_schemas)
_BOOL = ("true or false", _is_bool)
_SHAPES: Mapping[str, tuple[str, Callable[[object], bool]]] = MappingProxyType(
    {
        "type": (f"one or several of {list(TYPES)}", _is_type),
        "nullable": _BOOL,
        "enum": ("a list of values", _are_schemas),
        "const": ("a value", lambda value: True),
        "anyOf": _SCHEMAS,
        "oneOf": _SCHEMAS,
        "allOf": _SCHEMAS,
        "$ref": ("a text", lambda value: isinstance(value, str)),
        "$defs": _OBJECT,
        "definitions": _OBJECT,
        "properties": _OBJECT,
        "required": ("a list of names", _are_names),
        "additionalProperties": (
            "true, false or a schema",
            lambda value: _is_bool(value) or _is_object(value),
        ),
        "minProperties": _COUNT,
        "maxProperties": _COUNT,
        "items": _OBJECT,
        "minItems": _COUNT,
        "maxItems": _COUNT,
        "uniqueItems": _BOOL,
        "minimum": _NUMBER,
        "maximum": _NUMBER,
        "exclusiveMinimum": _NUMBER,
        "exclusiveMaximum": _NUMBER,
        "multipleOf": ("a number above 0", lambda value: _is_number(value) and value > 0),
        "minLength": _COUNT,
        "maxLength": _COUNT,
        "pattern": ("a regular expression", _is_pattern),
        "format": (
            f"one of {list(TEXT_FORMATS)}",
            lambda value: isinstance(value, str) and value in TEXT_FORMATS,
        ),
    }
)
CHECKED = frozenset(_SHAPES)


def check_schema(schema: Schema, name: str) -> None:
    """Checks that all a tool's parameters ask for is something that is checked in calls.

    Args:
      schema: Of the parameters; its references are to places in itself.
      name: The tool's, for messages.

    Raises:
      ValueError: One line with the keyword and its place: unknown, with a value that it cannot
        have, a reference elsewhere or in a circle; schemas nested too deep.

    Examples:
      >>> check_schema({"properties": {"a": {"type": "integer", "not": {"const": 3}}}}, "f")
      Traceback (most recent call last):
      ValueError: the keyword 'not' of f.properties.a is not supported in tools
    """
    _check(schema, name, 0)
    done: set[str] = set()
    for inner, where in _all(schema, name):
        _check_circles(inner, schema, where, done, frozenset())


def _check(schema: object, where: str, depth: int) -> None:
    if not isinstance(schema, Mapping):
        raise ValueError(f"expected {where} to be a JSON schema (an object), got {schema!r:.80}")
    if depth > DEEPEST:
        raise ValueError(f"expected schemas nested at most {DEEPEST} deep: {where:.80}...")
    for key, value in schema.items():
        if key in ANNOTATIONS:
            continue
        if key not in CHECKED:
            raise ValueError(f"the keyword {key!r:.80} of {where} is not supported in tools")
        expected, fits = _SHAPES[key]
        if not fits(value):
            raise ValueError(f"expected {key!r} of {where} to be {expected}, got {value!r:.80}")
    for inner, place in _inside(schema, where):
        _check(inner, place, depth + 1)


def _inside(schema: Schema, where: str) -> Iterator[tuple[object, str]]:
    """The schemas right inside of one, each with its place."""
    for key in ("properties", "$defs", "definitions"):
        for name, inner in schema.get(key, {}).items():
            yield inner, f"{where}.{key}.{name}"
    for key in ("anyOf", "oneOf", "allOf"):
        for i, inner in enumerate(schema.get(key, ())):
            yield inner, f"{where}.{key}[{i}]"
    for key in ("items", "additionalProperties"):
        if not isinstance(inner := schema.get(key, False), bool):
            yield inner, f"{where}.{key}"


def _all(schema: Schema, where: str) -> Iterator[tuple[Schema, str]]:
    yield schema, where
    for inner, place in _inside(schema, where):
        yield from _all(inner, place)


def _check_circles(
    schema: Schema, root: Schema, where: str, done: set[str], open_: frozenset[str]
) -> None:
    """Refuses references that lead to themselves without a step into the value."""
    for key in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(key, ()):
            _check_circles(inner, root, where, done, open_)
    if (ref := schema.get("$ref")) is None or ref in done:
        return
    if ref in open_:
        raise ValueError(f"the '$ref' {ref!r:.80} of {where} leads to itself")
    if len(open_) > DEEPEST:
        raise ValueError(f"the '$ref' of {where} leads on through more than {DEEPEST} others")
    _check_circles(resolve(ref, root, where), root, where, done, open_ | {ref})
    done.add(ref)


def resolve(ref: str, root: Schema, where: str) -> Schema:
    """What a reference such as `#/$defs/place` means.

    Raises:
      ValueError: It is not to a definition of the same schema.
    """
    found: object = root
    parts = ref.split("/")
    is_local = ref == "#" or (len(parts) == 3 and parts[1] in ("$defs", "definitions"))
    if parts[0] != "#" or not is_local:
        raise ValueError(f"expected '$ref' of {where} to be like '#/$defs/NAME', got {ref!r:.80}")
    for part in parts[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"the '$ref' {ref!r:.80} of {where} leads nowhere")
    return found
