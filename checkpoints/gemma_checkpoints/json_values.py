"""Values of a JSON object, checked as they are read: what is wrong is said with its key."""

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError

Json = dict[str, Any]

MAX_LAYERS = 256  # a forged depth must not become a billion of them


def nested(values: Json, key: str) -> Json:
    """The object at `key`; missing or null is an empty one."""
    value = values.get(key)
    if not isinstance(value, dict | None):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value or {}


def inside(values: Json, key: str, defaults: Json) -> Json:
    """What the object at `key` says, and `defaults` besides, under keys that begin with `key`, so
    that errors name the place."""
    return {f"{key}.{name}": value for name, value in (defaults | nested(values, key)).items()}


def whole(values: Json, key: str, *, least: int = 1) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        expected = "positive whole number" if least == 1 else f"whole number from {least} on"
        raise ValueError(f"{key} must be a {expected}, got {value!r}")
    return value


def positive(values: Json, key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return value


def flag(values: Json, key: str, *, default: bool) -> bool:
    """A switch; missing or null is the default."""
    value = values.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return default if value is None else value


def depth(values: Json, key: str) -> int:
    """A number of layers."""
    value = whole(values, key)
    if value > MAX_LAYERS:
        raise ValueError(f"{key} {value} is beyond {MAX_LAYERS}")
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      CheckpointError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"expected a JSON object, got {type(value).__name__}")
    return value
