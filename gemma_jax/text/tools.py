"""Tools that a model may call, declared by Python functions or by JSON."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .tool_keywords import check_schema
from .tool_scanner import LONGEST_NAME, NAME
from .tool_schemas import descriptions_of, schema_of

_KEYS = {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class Tool:
    """Declares a function that a model may call.

    Attributes:
      name: Letters, digits, `_`, `-` and `.`.
      description: What it does.
      parameters: JSON schema of an object.
      function: What runs, where there is something.

    Raises:
      ValueError: A name that no format can say; parameters that are no object, or that use a
        keyword of JSON Schema which is not checked in calls, see `check_schema`.

    Examples:
      >>> from typing import Literal
      >>> from gemma_jax.text.tools import Tool
      >>> def weather(city: str, unit: Literal["C", "F"] = "C"):
      ...     '''Tells the weather.
      ...
      ...     Args:
      ...       city: Where.
      ...     '''
      >>> tool = Tool.from_function(weather)
      >>> tool.description, tool.parameters["properties"]["city"], tool.parameters["required"]
      ('Tells the weather.', {'type': 'string', 'description': 'Where.'}, ['city'])
    """

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )
    function: Callable | None = field(default=None, compare=False)

    def __post_init__(self):
        name = self.name if isinstance(self.name, str) else ""
        if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
            raise ValueError(
                "expected the name of a tool to be letters, digits, '_', '-' and '.', at most "
                f"{LONGEST_NAME}, got {self.name!r:.200}"
            )
        if not isinstance(self.description, str):
            raise ValueError(f"expected a text as the description of {name}")
        schema = self.parameters
        is_object = isinstance(schema, Mapping) and schema.get("type", "object") == "object"
        if not is_object or not isinstance(schema.get("properties", {}), Mapping):
            raise ValueError(
                f"expected the parameters of {name} to be a JSON schema of type 'object', "
                f"got {schema!r:.200}"
            )
        check_schema(schema, name)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of its parameters in their order."""
        return tuple(self.parameters.get("properties", {}))

    @property
    def bare(self) -> dict[str, object]:
        """The declaration as JSON."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }

    @classmethod
    def from_json(cls, declaration: Mapping[str, object]) -> Tool:
        """Reads `{"type": "function", "function": {...}}`, or what stands inside of it.

        Raises:
          ValueError: Another type, a key that there is not, or what `Tool` refuses.
        """
        if not isinstance(declaration, Mapping):
            raise ValueError(f"expected a tool as an object of JSON, got {declaration!r:.200}")
        inner = declaration
        if "function" in declaration or "type" in declaration:
            kind = declaration.get("type", "function")
            if kind != "function":
                raise ValueError(f"expected a tool of type 'function', got {kind!r:.200}")
            inner = declaration.get(
                "function", {k: declaration[k] for k in declaration if k != "type"}
            )
            outer = declaration.keys() - {"type", "function"}
            if "function" in declaration and outer:
                raise ValueError(f"a tool has no {sorted(outer)[0]!r} beside 'function'")
        if not isinstance(inner, Mapping) or (unknown := sorted(inner.keys() - _KEYS)):
            key = f"{unknown[0]!r}" if isinstance(inner, Mapping) else f"{inner!r:.200}"
            raise ValueError(f"expected a tool with {sorted(_KEYS)}, got {key}")
        return cls(
            inner.get("name"),
            inner.get("description") or "",
            inner.get("parameters") or {"type": "object", "properties": {}},
        )

    @classmethod
    def from_function(cls, function: Callable) -> Tool:
        """Reads a function's name, type hints, defaults and docstring (`Args:`, as Google writes).

        Raises:
          ValueError: A parameter without a type, of a type that JSON has not, or without a name.
        """
        if not callable(function):
            raise ValueError(f"expected a tool, a function or JSON, got {function!r:.200}")
        name = getattr(function, "__name__", "")
        text, of_parameters = descriptions_of(inspect.getdoc(function) or "")
        parameters = schema_of(function, of_parameters)
        return cls(name, re.sub(r"\s+", " ", text), parameters, function)


def as_tools(tools: Iterable[Tool | Callable | Mapping[str, object]]) -> tuple[Tool, ...]:
    """Declarations in whatever form they come.

    Raises:
      ValueError: One of them cannot be read, or two have one name.
    """
    read = []
    for tool in tools:
        if isinstance(tool, Mapping):
            tool = Tool.from_json(tool)
        elif not isinstance(tool, Tool):
            tool = Tool.from_function(tool)
        if any(tool.name == other.name for other in read):
            raise ValueError(f"expected tools of different names, got two called {tool.name!r}")
        read.append(tool)
    return tuple(read)
