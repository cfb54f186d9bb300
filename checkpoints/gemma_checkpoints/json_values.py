"""Values of a JSON object, checked as they are read: what is wrong is said with its key."""

from typing import Any

Json = dict[str, Any]

MAX_LAYERS = 256  # a forged depth must not become a billion of them


def nested(values: Json, key: str) -> Json:
    """The object at `key`; missing or null is an empty one."""
    value = values.get(key)
    if not isinstance(value, dict | None):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value or {}


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
