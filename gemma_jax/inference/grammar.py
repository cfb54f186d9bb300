"""What a text must look like: a JSON Schema, a regular expression or a Lark grammar."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Schema = Mapping[str, Any] | str | type
"""A JSON Schema as a dict or as JSON, or a pydantic model."""


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Says what a text must look like.

    Attributes:
      kind: `"schema"` (JSON Schema, as JSON), `"regex"` or `"lark"`.
      text: Of it.
      parse: Makes an object of a text; `None` without a pydantic model.

    Examples:
      >>> from gemma_jax.inference.grammar import Grammar
      >>> Grammar.of(schema={"type": "integer"})
      Grammar(kind='schema', text='{"type": "integer"}', parse=None)
    """

    kind: Literal["schema", "regex", "lark"]
    text: str
    parse: Callable[[str], object] | None = None

    @classmethod
    def of(
        cls, *, schema: Schema | None = None, regex: str | None = None, lark: str | None = None
    ) -> "Grammar | None":
        """The one that is given, if any.

        Raises:
          ValueError: Several of them, an empty text, a schema that is neither a dict nor JSON nor a
            pydantic model.
        """
        given = {"schema": schema, "regex": regex, "lark": lark}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"give {' or '.join(names)}, not both")
        if schema is not None:
            return cls(kind="schema", text=_json(schema), parse=_parser(schema))
        for name in names:
            if not isinstance(given[name], str) or not given[name]:
                raise ValueError(f"{name} must be a text, got {given[name]!r:.80}")
            return cls(kind=name, text=given[name])
        return None


def _json(schema: Schema) -> str:
    if isinstance(schema, str):
        _check_json(schema)
        return schema
    if hasattr(schema, "model_json_schema"):
        schema = _closed(schema.model_json_schema())
    if not isinstance(schema, Mapping):
        raise ValueError(
            f"schema must be a dict, JSON or a pydantic model, got {type(schema).__name__}"
        )
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"schema is no JSON: {error or type(error).__name__}") from None


def _closed(schema: Any) -> Any:
    """Without properties that a pydantic model does not have: it would only ignore them."""
    if not isinstance(schema, dict):
        return schema
    one = {key: _closed(schema[key]) for key in ("items", "additionalProperties") if key in schema}
    many = {
        key: [_closed(each) for each in schema[key]]
        for key in ("anyOf", "allOf", "oneOf", "prefixItems")
        if key in schema
    }
    named = {
        key: {name: _closed(each) for name, each in schema[key].items()}
        for key in ("properties", "$defs")
        if key in schema
    }
    closing = {"additionalProperties": False} if "properties" in schema else {}
    return {**closing, **schema, **one, **many, **named}


def _check_json(text: str) -> None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"schema is no JSON: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"schema must be a JSON object, got {text!r:.80}")


def _parser(schema: Schema) -> Callable[[str], object] | None:
    return getattr(schema, "model_validate_json", None)
