"""Lark rules of values and arguments, for the formats whose calls are not JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .tool_formats import BARE_NAME, marked_value, python_value
from .tool_keywords import ANNOTATIONS, resolve
from .tool_marker_reader import ESCAPE
from .tools import Tool

# As `json.dumps` writes it.
_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_LIMITS = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
_LIMITS["integer"] = _LIMITS["number"]
_KINDS = ("string", "number", "boolean", "null", "array", "object")
# Marks inside of a text would end it: they are special tokens, and here no plain text either.
_MARKED_TEXT = rf"/(?s:.*)/ & ~/(?s:.*){ESCAPE}(?s:.*)/"

Schema = Mapping[str, object]
Pair = Callable[[str, str], str]


def quoted(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Schema) -> str:
    """A rule for JSON of this schema, itself the root of its references.

    Raises:
      ValueError: It asks for distinct items, which no grammar can tell.
    """
    return schema_rule(_without_nullable(schema))


def schema_rule(schema: Schema) -> str:
    """A rule for JSON of a schema as the engine of grammars reads it."""
    return "%json " + json.dumps({"x-guidance": _LAYOUT, **schema})


def _without_nullable(schema: Schema) -> dict[str, object]:
    """The same in the words of JSON Schema alone, without annotations."""
    if schema.get("uniqueItems"):
        raise ValueError("no grammar can hold 'uniqueItems'; use tool_choice 'auto'")
    plain: dict[str, object] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions"):
            plain[key] = {name: _without_nullable(inner) for name, inner in value.items()}
        elif key in ("anyOf", "oneOf", "allOf"):
            plain[key] = [_without_nullable(inner) for inner in value]
        elif key == "items" or (key == "additionalProperties" and isinstance(value, Mapping)):
            plain[key] = _without_nullable(value)
        elif key not in ANNOTATIONS and key not in ("nullable", "uniqueItems"):
            plain[key] = value
    if not schema.get("nullable"):
        return plain
    return {"anyOf": [plain, {"type": "null"}]}


@dataclass(frozen=True)
class Style:
    """How a format writes values.

    Attributes:
      format: Its name, for messages.
      write: A value as text.
      words: Of true, false and null.
      comma, colon: Between entries; between a key and its value.
      text: The expression of texts; "" for JSON's.
    """

    format: str
    write: Callable[[object], str]
    words: tuple[str, str, str]
    comma: str
    colon: str
    text: str = ""


PYTHON_STYLE = Style("python", python_value, ("True", "False", "None"), ", ", ": ")
FUNCTIONGEMMA_STYLE = Style(
    "functiongemma", marked_value, ("true", "false", "null"), ",", ":", "marked"
)


class ValueRules:
    """Adds the rules of one tool's values to a grammar.

    Args:
      style: Of the format.
      tool: For its references and messages.
      prefix: Of the names of rules.
      rules: Names to bodies; more are added.
    """

    def __init__(self, style: Style, tool: Tool, prefix: str, rules: dict[str, str]):
        self._style, self._tool, self._prefix, self._rules = style, tool, prefix, rules
        self._by_ref: dict[str, str] = {}
        self._count = 0

    def value(self, schema: Schema, where: str) -> str:
        """The name of a rule for values of a schema."""
        name = f"{self._prefix}_value_{self._count}"
        self._count += 1
        self._rules[name] = ""  # it may be asked for within
        self._rules[name] = self._body(schema, where, name)
        return name

    def _body(self, schema: Schema, where: str, name: str) -> str:
        limits = {key: schema[key] for key in schema if key not in ANNOTATIONS | {"nullable"}}
        limits = {key: limits[key] for key in limits if key not in ("$defs", "definitions")}
        if schema.get("nullable"):
            inner = self.value(limits, where)
            return f"{inner} | {quoted(self._style.words[2])}"
        for key in ("oneOf", "uniqueItems", "minProperties", "maxProperties"):
            if limits.pop(key, False):
                self._refuse(key, where)
        for key in ("$ref", "anyOf", "allOf"):
            if key in limits:
                self._alone(key, limits, where)
                return self._choice(key, limits[key], where, name)
        if "enum" in limits or "const" in limits:
            values = limits.get("enum", [limits.get("const")])
            self._alone("enum" if "enum" in limits else "const", limits, where, "type")
            return " | ".join(map(self._literal, values))
        kinds = limits.pop("type", None) or self._kinds(limits, where)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        known = {key for kind in kinds for key in _LIMITS.get(kind, ())}
        if unknown := sorted(limits.keys() - known):
            self._refuse(unknown[0], where)
        return " | ".join(self._kind(kind, limits, where) for kind in kinds)

    def _choice(self, key: str, inner: object, where: str, name: str) -> str:
        if key == "anyOf":
            return " | ".join(self.value(each, where) for each in inner)
        if key == "allOf":
            if len(inner) > 1:
                self._refuse(key, where)
            return self.value(inner[0], where)
        if inner not in self._by_ref:
            self._by_ref[inner] = name
            return self._body(resolve(inner, self._tool.parameters, where), where, name)
        return self._by_ref[inner]

    def _alone(self, key: str, limits: Schema, where: str, *beside: str) -> None:
        if others := sorted(limits.keys() - {key, *beside}):
            self._refuse(others[0], f"{where} beside {key!r}")

    def _kinds(self, limits: Schema, where: str) -> Sequence[str]:
        """The types of values where the schema names none."""
        if not limits:
            return _KINDS
        for kind in ("object", "array"):
            if limits.keys() <= set(_LIMITS[kind]):
                return (kind,)
        raise ValueError(
            f"expected a 'type' beside {sorted(limits)[0]!r} of {where}, for a grammar of calls"
        )

    def _refuse(self, key: str, where: str) -> None:
        raise ValueError(
            f"the grammar of the format {self._style.format} cannot hold {key!r} of {where}; "
            "use the format json, or tool_choice 'auto'"
        )

    def _kind(self, kind: str, limits: Schema, where: str) -> str:
        if kind == "boolean":
            return " | ".join(map(quoted, self._style.words[:2]))
        if kind == "null":
            return quoted(self._style.words[2])
        if kind == "array":
            return self._list(limits, where)
        if kind == "object":
            return f'"{{" {self.entries(limits, where, self.pair)} "}}"'
        if kind == "string" and self._style.text:
            self._rules["marked"] = f"{ESCAPE} MARKED {ESCAPE}"
            self._rules["MARKED"] = _MARKED_TEXT
            return "marked"
        own = {key: limits[key] for key in _LIMITS[kind] if key in limits}
        return self._add(json_rule({"type": kind, **own}))

    def _add(self, body: str) -> str:
        name = f"{self._prefix}_value_{self._count}"
        self._count += 1
        self._rules[name] = body
        return name

    def _list(self, limits: Schema, where: str) -> str:
        least, most = limits.get("minItems", 0), limits.get("maxItems")
        if most is not None and most < max(least, 1):
            if most < least:
                self._refuse("maxItems", where)
            return '"[" "]"'
        item = self._any_or(limits.get("items"), f"{where}[]")
        bounds = f"{{{max(least, 1) - 1},{'' if most is None else most - 1}}}"
        items = f"{item} ({quoted(self._style.comma)} {item}){bounds}"
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _any_or(self, schema: Schema | None, where: str) -> str:
        """The rule of a schema; without one, that of any value, which is made once."""
        if schema is not None and schema.keys() - ANNOTATIONS:
            return self.value(schema, where)
        name = f"any_{self._style.format}"
        if name not in self._rules:
            self._rules[name] = ""
            self._rules[name] = self._body({}, where, name)
        return name

    def entries(self, schema: Schema, where: str, pair: Pair) -> str:
        """The expression of an object's entries, without what stands around them."""
        inner, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        required = schema.get("required", ())
        if missing := [key for key in required if key not in inner]:
            self._refuse(f"required: {missing[0]}", where)
        if not inner and others is not False:
            return self._free_entries(others, where, pair)
        pairs = [
            (pair(key, self._any_or(each, f"{where}.{key}")), key in required)
            for key, each in inner.items()
        ]
        return self._in_order(pairs)

    def _free_entries(self, others: object, where: str, pair: Pair) -> str:
        value = self._any_or(others if isinstance(others, Mapping) else None, where)
        if pair == self.argument:
            self._refuse("additionalProperties", where)
        key = self._kind("string", {}, where)
        if self._style.text:
            self._rules["BARE"] = f"/{BARE_NAME.pattern}/"
            key = f"(BARE | {key})"
        entry = f"{key} {quoted(self._style.colon)} {value}"
        return f"({entry} ({quoted(self._style.comma)} {entry})*)?"

    def _in_order(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """Entries in their order, those that are not required or not; commas between them."""
        prefix = f"{self._prefix}_{self._count}"
        self._count += 1
        comma = quoted(self._style.comma)
        for i in reversed(range(len(pairs))):
            entry, required = pairs[i]
            more = f" {prefix}_next_{i + 1}" if i + 1 < len(pairs) else ""
            other = f"{prefix}_first_{i + 1}" if i + 1 < len(pairs) else '""'
            self._rules[f"{prefix}_next_{i}"] = (
                f"{comma} {entry}{more}" if required else f"({comma} {entry})?{more}"
            )
            self._rules[f"{prefix}_first_{i}"] = f"{entry}{more}" + (
                "" if required else f" | {other}"
            )
        if not pairs:
            return '""'
        del self._rules[f"{prefix}_next_0"]
        return f"{prefix}_first_0"

    def argument(self, key: str, value: str) -> str:
        """The expression of a named argument of Python."""
        if BARE_NAME.fullmatch(key):
            return f"{quoted(f'{key}=')} {value}"
        return f'{quoted(f"**{{{json.dumps(key)}: ")} {value} "}}"'

    def pair(self, key: str, value: str) -> str:
        """The expression of an entry of an object."""
        if self._style.text and BARE_NAME.fullmatch(key):
            return f"{quoted(key + self._style.colon)} {value}"
        return f"{self._literal(key)} {quoted(self._style.colon)} {value}"

    def _literal(self, value: object) -> str:
        """A value as it is written; marks are special tokens."""
        parts = self._style.write(value).split(ESCAPE)
        if not self._style.text:
            return quoted(self._style.write(value))
        found = [quoted(part) for part in parts[:1] if part]
        for part in parts[1:]:
            found += [ESCAPE, *([quoted(part)] if part else [])]
        return " ".join(found)
