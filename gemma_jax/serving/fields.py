"""Fields of a JSON object, each read by name and type; what nobody has read is refused."""

import json
import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from gemma_jax.serving.errors import ApiError, refused

_KINDS = {
    dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number",
    float: "a number", type(None): "null",
}  # fmt: skip


def parse_json(data: bytes, deepest: int) -> Any:
    """A JSON value.

    Args:
      deepest: How far objects and lists may lie in each other.

    Raises:
      ApiError: No JSON in UTF-8, numbers or texts that JSON cannot hold, a name given twice.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise refused(f"the body is not valid UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _too_deep(deepest) from None
    except ValueError as error:  # numbers of thousands of digits as well
        raise refused(f"the body is not valid JSON: {error!s:.200}") from None
    _check_values(value, deepest)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise refused(f"{twice!r:.80} is given twice in one object")
    return values


def _no_constant(name: str) -> None:
    raise refused(f"the body is not valid JSON: {name} is no number")


def _too_deep(deepest: int) -> ApiError:
    return refused(f"the body is nested more than {deepest} levels deep")


def _check_values(value: Any, deepest: int) -> None:
    """Depth, and texts that have a UTF-8 form; without recursion."""
    level = [value]
    for _ in range(deepest + 1):
        texts = [one for one in level if isinstance(one, str)]
        texts += [name for one in level if isinstance(one, dict) for name in one]
        for text in texts:
            _check_text(text)
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise _too_deep(deepest)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused("the body holds a lone surrogate, which is no character") from None


class Fields:
    """Reads the fields of one object. `null` counts as a field that is not given.

    Attributes:
      where: Path of the object in the body, for messages.
    """

    def __init__(self, values: object, where: str = ""):
        self.where = where
        if not isinstance(values, dict):
            raise self._wrong(values, "an object")
        self._values, self._left = values, dict.fromkeys(values)
        self._known: list[str] = []

    def path(self, name: str | int = "") -> str | None:
        """`messages[0].content`; `None` for the body."""
        if name == "":
            return self.where or None
        return f"{self.where}.{name}" if self.where else str(name)

    def names(self) -> list[str]:
        """All that are given."""
        return list(self._values)

    def raw(self, name: str) -> Any:
        """The value as it is."""
        self._left.pop(name, None)
        self._known.append(name)
        return self._values.get(name)

    def text(
        self, name: str, default: str | None = None, *, choices: Sequence[str] = (), most: int = 0
    ) -> str | None:
        """A text, out of `choices` if there are some, of at most `most` characters if not 0."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(value, "a text", name)
        if choices and value not in choices:
            expected = " or ".join(map(repr, choices))
            raise self.error(f"expected {expected}, got {value!r:.80}", name)
        if most and len(value) > most:
            raise self.error(f"{len(value)} characters are more than {most}", name)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(value, "true or false", name)
        return default if value is None else value

    def number(
        self, name: str, default: float | None = None, *, low: float, high: float
    ) -> float | None:
        """A finite number in `[low, high]`."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(value, "a number", name)
        if not math.isfinite(value) or not low <= value <= high:
            raise self.error(f"expected {low:g} to {high:g}, got {value!r:.80}", name)
        return value

    def integer(self, name: str, default: int | None = None, *, low: int, high: int) -> int | None:
        """A whole number in `[low, high]`."""
        value = self.raw(name)
        if value is None:
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole:
            raise self._wrong(value, "a whole number", name)
        if not low <= value <= high:
            raise self.error(f"expected {low} to {high}, got {value!r:.80}", name)
        return int(value)

    def items(self, name: str, *, most: int) -> list | None:
        """A list of at most so many values."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(value, "a list", name)
        if len(value) > most:
            raise self.error(f"{len(value)} entries are more than {most}", name)
        return value

    def texts_or_ids(self, name: str, *, vocab_size: int, most: int = 0) -> list[str | list[int]]:
        """A text, token ids, or a list of them, at most so many if not 0; as a list."""
        value = self.raw(name)
        several = isinstance(value, list) and value and isinstance(value[0], (str, list))
        found = value if several else [value]
        if most and len(found) > most:
            raise self.error(f"{len(found)} entries are more than {most}", name)
        for one in found:
            if isinstance(one, str) and one:
                continue
            if not isinstance(one, list) or not one or not all(type(i) is int for i in one):
                expected = "expected a text, token ids, or a list of them, none empty"
                raise self.error(expected, name)
            if not all(0 <= i < vocab_size for i in one):
                raise self.error(f"expected token ids in [0, {vocab_size})", name)
        return found

    def object(self, name: str) -> "Fields | None":
        value = self.raw(name)
        return None if value is None else Fields(value, self.path(name))

    def only(self, name: str, *accepted: object, because: str) -> None:
        """Refuses all values of a field but those under which nothing changes."""
        value = self.raw(name)
        if value is None or any(type(value) is type(one) and value == one for one in accepted):
            return
        raise self.error(f"{value!r:.80} is not supported: {because}", name, "unsupported_value")

    def close(self) -> None:
        """Refuses what was given and not read."""
        for name in self._left:
            near = get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise self.error(f"unknown field{hint}", name, "unknown_parameter")

    def error(self, message: str, name: str = "", code: str | None = None) -> ApiError:
        path = self.path(name)
        path = None if path is None else path[:120]
        return refused(message if path is None else f"{path}: {message}", path, code)

    def _wrong(self, value: object, expected: str, name: str = "") -> ApiError:
        kind = _KINDS.get(type(value), type(value).__name__)
        subject = "" if self.path(name) else "the body: "
        return self.error(f"{subject}expected {expected}, got {kind}", name, "invalid_type")
