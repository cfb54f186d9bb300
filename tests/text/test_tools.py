"""Tools are declared by functions or JSON, and refused where something cannot be said."""

from dataclasses import dataclass
from typing import Literal, TypedDict

import pytest

from gemma_jax.text.tool_formats import FUNCTIONGEMMA, tool_format
from gemma_jax.text.tools import Tool, as_tools


@dataclass
class Place:
    city: str
    country: str = "FR"


class Span(TypedDict):
    start: int


def book(
    place: Place, spans: list[Span], unit: Literal["C", "F"] = "C", *, note: str | None = None
) -> str:
    """Books a
    room.

    Args:
      place: Where,
        exactly.
      spans (list): When: from and to.

    Returns:
      Nothing.
    """


def test_a_function():
    tool = Tool.from_function(book)
    place = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
        "required": ["city"],
        "description": "Where, exactly.",
    }
    span = {"type": "object", "properties": {"start": {"type": "integer"}}, "required": ["start"]}
    assert (tool.name, tool.description) == ("book", "Books a room.")
    assert tool.parameters["required"] == ["place", "spans"]
    assert tool.parameters["properties"] == {
        "place": place,
        "spans": {"type": "array", "items": span, "description": "When: from and to."},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "note": {"type": "string", "nullable": True},
    }


def no_hint(a): ...


def odd(a: complex): ...


def spread(*a: int): ...


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        (no_hint, "expected a type for 'a' of no_hint"),
        (odd, "that JSON has for 'a' of odd"),
        (spread, "takes 'a' without a name"),
        ({"type": "retrieval"}, "type 'function', got 'retrieval'"),
        ({"name": "f", "parameterz": {}}, "'parameterz'"),
        ({"name": "f g"}, "name of a tool"),
        ({"name": "f", "parameters": {"type": "array"}}, "of type 'object'"),
        (3, "a type|a function|tool|callable"),
    ],
)
def test_what_cannot_be_declared_is_refused(tool, line):
    with pytest.raises((ValueError, TypeError), match=line):
        as_tools([tool])


def test_json_of_both_forms():
    inner = {"name": "a.b-c", "description": "d", "parameters": {"properties": {"x": {}}}}
    one, other = Tool.from_json(inner), Tool.from_json({"type": "function", "function": inner})
    assert one == other == Tool.from_json({"type": "function", **inner})
    with pytest.raises(ValueError, match="two called 'a.b-c'"):
        as_tools([one, other])


def test_a_format_says_what_it_cannot():
    tool = Tool("f", "", {"properties": {"a": {"anyOf": [{}]}}})
    with pytest.raises(ValueError, match=r"cannot say 'anyOf' of f.a"):
        FUNCTIONGEMMA.declare([tool])
    with pytest.raises(ValueError, match="got 'xml'"):
        tool_format("xml")
