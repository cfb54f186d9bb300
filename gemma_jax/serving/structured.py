"""Answers that follow a grammar: what requests say of it."""

import json
from dataclasses import dataclass, replace

from gemma_jax.inference.requests import Request
from gemma_jax.serving.errors import refused
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.limits import Limits
from gemma_jax.serving.served import Served
from gemma_jax.text import chat_stop_ids

ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True)
class Structure:
    """Holds a grammar.

    Attributes:
      kind: `"schema"` (JSON Schema, as JSON), `"regex"` or `"lark"`.
      text: Of it.
      param: The field that it came in.
    """

    kind: str
    text: str
    param: str


def read_structure(fields: Fields, limits: Limits) -> Structure | None:
    """`response_format`, or one of the extras that other servers have.

    Raises:
      ApiError: Several of them, or one that is no grammar's text.
    """
    found = [
        _response_format(fields),
        _schema(fields, "guided_json"),
        *(
            _text(fields, n, kind)
            for n, kind in (("guided_regex", "regex"), ("guided_grammar", "lark"))
        ),
    ]
    given = [one for one in found if one is not None]
    if len(given) > 1:
        raise fields.error(f"give this or {given[1].param}, not both", given[0].param)
    for one in given:
        if len(one.text.encode()) > limits.schema_bytes:
            raise fields.error(f"more than {limits.schema_bytes} bytes", one.param)
    return given[0] if given else None


def constrained(request: Request, structure: Structure, served: Served) -> Request:
    """The request, held to the grammar.

    Raises:
      ApiError: The grammar cannot be read, or this server has none.
    """
    if served.structured is None:
        raise refused(
            f"{structure.param}: structured output is not available on this server",
            structure.param,
            "unsupported_value",
        )
    try:
        constraint = served.structured(structure.kind, structure.text)
    except ValueError as error:
        raise refused(f"{structure.param}: {error}", structure.param) from None
    # Where the grammar is at its end, these alone are legal.
    stop_ids = tuple(dict.fromkeys((*request.stop_ids, *chat_stop_ids(served.tokenizer))))
    return replace(request, constraint=constraint, stop_ids=stop_ids)


def _response_format(fields: Fields) -> Structure | None:
    given = fields.object("response_format")
    if given is None:
        return None
    kind = _format_kind(given)
    structure = None
    if kind == "json_object":
        structure = Structure("schema", ANY_OBJECT, "response_format")
    if kind == "json_schema":
        inner = given.object("json_schema")
        if inner is None:
            raise given.error("is missing", "json_schema")
        structure = _named_schema(inner)
        inner.close()
    given.close()
    return structure


def read_text_format(given: Fields, limits: Limits) -> Structure | None:
    """`text.format` of responses, which has in one object what `response_format` has in two.

    Raises:
      ApiError: Another type, no schema, one that is too long.
    """
    kind, structure = _format_kind(given), None
    if kind == "json_object":
        structure = Structure("schema", ANY_OBJECT, given.where)
    if kind == "json_schema":
        structure = _named_schema(given)
    given.close()
    if structure is not None and len(structure.text.encode()) > limits.schema_bytes:
        raise given.error(f"more than {limits.schema_bytes} bytes", "schema")
    return structure


def _format_kind(given: Fields) -> str:
    kind = given.text("type", choices=("text", "json_object", "json_schema"))
    if kind is None:
        raise given.error("is missing", "type")
    return kind


def _named_schema(inner: Fields) -> Structure:
    inner.text("name", most=64)  # for people, as is the description
    inner.text("description", most=4096)
    inner.boolean("strict")  # the schema is followed in any case
    schema = _schema(inner, "schema")
    if schema is None:
        raise inner.error("is missing", "schema")
    return schema


def _schema(fields: Fields, name: str) -> Structure | None:
    value = fields.raw(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise fields.error("expected a JSON Schema, an object", name)
    return Structure("schema", json.dumps(value), fields.path(name) or name)


def _text(fields: Fields, name: str, kind: str) -> Structure | None:
    value = fields.text(name)
    return None if value is None else Structure(kind, value, name)
