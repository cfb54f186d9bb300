"""What a tool's JSON schema asks for is checked in calls, or refused when the tool is declared."""

import re

import pytest

from gemma_jax.text.tool_arguments import check_arguments
from gemma_jax.text.tool_formats import FUNCTIONGEMMA
from gemma_jax.text.tools import Tool

TREE = {"$ref": "#/$defs/tree"}
DEFS = {"tree": {"type": "object", "required": ["v"], "additionalProperties": False,
                 "properties": {"v": {"type": "integer"}, "next": TREE}}}  # fmt: skip
CASES = [
    ({"minimum": 2}, [2, 2.5, "a"], [1]),
    ({"maximum": 2}, [2, -1], [2.01]),
    ({"exclusiveMinimum": 2}, [2.1], [2]),
    ({"exclusiveMaximum": 2}, [1, True], [2, 2.0]),
    ({"multipleOf": 0.1}, [0.3, 7], [0.35]),
    ({"minLength": 2}, ["é😀", 1], ["😀"]),
    ({"maxLength": 2}, ["😀😀", ""], ["abc"]),
    ({"pattern": "^a+$"}, ["aa", 3], ["ba", ""]),
    ({"format": "date"}, ["2024-02-29"], ["2024-13-01", "2024-02-29 "]),
    ({"format": "date-time"}, ["2024-02-29T10:00:00Z"], ["2024-02-29"]),
    ({"format": "ipv4"}, ["127.0.0.1"], ["256.0.0.1", "1.2.3"]),
    ({"minItems": 1}, [[0], ""], [[]]),
    ({"maxItems": 1}, [[], [0]], [[0, 0]]),
    ({"uniqueItems": True}, [[1, True, "1", {"a": 1}]], [[1, 1.0], [{"a": [1]}, {"a": [1]}]]),
    ({"minProperties": 1}, [{"a": 1}, []], [{}]),
    ({"maxProperties": 1}, [{"a": 1}], [{"a": 1, "b": 1}]),
    ({"const": {"a": 1}}, [{"a": 1.0}], [{"a": True}, None]),
    ({"enum": [1, "x", None]}, [1, "x", None], [True, "y"]),
    ({"type": ["string", "null"]}, ["a", None], [1]),
    ({"type": "integer", "nullable": True}, [3, 3.0, None], [3.5, "3"]),
    ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, ["a", 3], [2]),
    ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, [2, 3], [6, 5]),
    ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, [1, 3], [0, 4]),
    ({"items": {"minimum": 1}}, [[1, 2]], [[1, 0]]),
    ({"additionalProperties": {"minimum": 1}}, [{"a": 1}], [{"a": 0}]),
    (TREE, [{"v": 1}, {"v": 1, "next": {"v": 2}}], [{"v": 1, "next": {"v": "2"}}, {"next": {}}]),
    ({**TREE, "maxProperties": 1}, [{"v": 1}], [{"v": 1, "next": {"v": 2}}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), CASES, ids=lambda x: str(x)[:40])
def test_every_keyword_is_checked(schema, right, wrong):
    tool = Tool("f", "", {"properties": {"a": schema}, "$defs": DEFS})
    for value in right:
        check_arguments(tool, {"a": value})
    for value in wrong:
        with pytest.raises(ValueError, match="of f") as error:
            check_arguments(tool, {"a": value})
        assert "\n" not in str(error.value)


REFUSED = [
    ({"not": {}}, "keyword 'not' of f.properties.a is not supported"),
    ({"items": {"if": {}}}, "keyword 'if' of f.properties.a.items"),
    ({"patternProperties": {}}, "'patternProperties'"),
    ({"prefixItems": [{}]}, "'prefixItems'"),
    ({"dependentRequired": {}}, "'dependentRequired'"),
    ({"minimum": "3"}, "'minimum' of f.properties.a to be a number"),
    ({"maxLength": -1}, "to be a count"),
    ({"pattern": "("}, "a regular expression"),
    ({"format": "color"}, "'format' of f.properties.a to be one of"),
    ({"type": "text"}, "'type' of f.properties.a"),
    ({"anyOf": []}, "a list of schemas"),
    ({"anyOf": [3]}, r"f.properties.a.anyOf\[0\] to be a JSON schema"),
    ({"enum": []}, "a list of values"),
    ({"$ref": "http://a/b"}, "like '#/\\$defs/NAME'"),
    ({"$ref": "#/$defs/none"}, "leads nowhere"),
    ({"$ref": "#/$defs/x"}, "leads to itself"),
]


@pytest.mark.parametrize(("schema", "line"), REFUSED)
def test_no_keyword_is_passed_over(schema, line):
    circle = {"x": {"anyOf": [{"$ref": "#/$defs/y"}]}, "y": {"$ref": "#/$defs/x"}}
    parameters = {"type": "object", "properties": {"a": schema}}
    if "/x" in str(schema):
        parameters["$defs"] = circle
    with pytest.raises(ValueError, match=line):
        Tool.from_json({"name": "f", "parameters": parameters})


def test_hostile_schemas_end():
    deep = {}
    for _ in range(300):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="at most 64 deep"):
        Tool("f", "", {"properties": {"a": deep}})
    wide = {f"d{i}": {"anyOf": 2 * [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(30)}
    wide["d30"] = {"type": "string"}
    tool = Tool("f", "", {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": wide})
    check_arguments(tool, {"a": "x"})
    with pytest.raises(ValueError, match="too long to check"):
        check_arguments(tool, {"a": 1})


def test_functiongemma_leaves_out_annotations_alone():
    said = {"type": "string", "description": "Where"}
    more = {"title": "City", "default": "Rome", "examples": ["Rome"], "$comment": "?"}
    tools = [
        Tool("f", "", {"type": "object", "properties": {"city": said}}),
        Tool("f", "", {"type": "object", "properties": {"city": said | more}, "$schema": "x",
                       "additionalProperties": False}),
    ]  # fmt: skip
    assert FUNCTIONGEMMA.declare(tools[:1]) == FUNCTIONGEMMA.declare(tools[1:])
    for key, value in {"minLength": 1, "additionalProperties": True, "$ref": "#"}.items():
        tool = Tool("f", "", {"properties": {"a": {key: value}}})
        with pytest.raises(ValueError, match=re.escape(f"cannot say {key!r} of f.a")):
            FUNCTIONGEMMA.declare([tool])
