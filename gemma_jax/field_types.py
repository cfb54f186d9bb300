"""Holds the fields of a frozen dataclass against their annotations, with one line for a wrong one.

Annotations may be `int`, `float`, `bool`, `str`, a class, `Literal[...]`, unions of classes, `... |
None`, and `tuple[...]` of these.
"""

from collections.abc import Collection, Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import reduce, wraps
from numbers import Integral, Real
from operator import or_
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from gemma_jax.storages import one_of

_EXPECTED = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
_NUMBERS = {int: Integral, float: Real}  # those of NumPy too
Class = TypeVar("Class", bound=type)


def check_keywords(
    owner: str, given: Iterable[str], known: Collection[str], what: str = "argument"
) -> None:
    """Refuses a keyword that there is not, and names the nearest one.

    Raises:
      TypeError: `load has no argument 'wights'; did you mean weights?`
    """
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{owner} has no {what} {name!r}; {hint}")


def named_fields(cls: Class) -> Class:
    """Lets a dataclass refuse keywords as `check_keywords` does, in `replace` too."""
    init, known = cls.__init__, [field.name for field in fields(cls) if field.init]

    @wraps(init)
    def checked(self, *args, **values):
        check_keywords(cls.__name__, values, known)
        init(self, *args, **values)

    cls.__init__ = checked
    return cls


def check_types(owner: Any) -> None:
    """Refuses fields of a wrong type; for use in `__post_init__`.

    Numbers of NumPy become those of Python, and lists tuples: configs are hashed and stored.

    Raises:
      ValueError: A field of a wrong type: `d_model must be an integer, got 64.5`.
    """
    for field in fields(owner):
        value = _checked(field.name, getattr(owner, field.name), field.type)
        object.__setattr__(owner, field.name, value)


def checked_value(name: str, value: Any, kind: Any) -> Any:
    """A value as its annotation has it; for what is no field.

    Raises:
      ValueError: A value of a wrong type.
    """
    return _checked(name, value, kind)


def check_positive(owner: Any, *names: str) -> None:
    """Raises `ValueError` for the first of these fields that is not above zero."""
    for name in names:
        if not getattr(owner, name) > 0:
            raise ValueError(f"{name}={getattr(owner, name)} must be positive")


def _checked(name: str, value: Any, kind: Any, or_none: str = "") -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:  # such as `int | None`
        if NoneType in args:
            left = reduce(or_, (arg for arg in args if arg is not NoneType))
            return None if value is None else _checked(name, value, left, " or None")
        if isinstance(value, kind):
            return value
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name}={value!r} must be {one_of(args)}")
        return value
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_checked(f"{name}[{i}]", one, args[0]) for i, one in enumerate(value))
    elif kind in _NUMBERS:
        if isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool):
            return int(value) if isinstance(value, Integral) else float(value)
    elif isinstance(value, kind):
        return value
    raise ValueError(f"{name} must be {_expected(kind)}{or_none}, got {shortened(value)}")


def _expected(kind: Any) -> str:
    if get_origin(kind) is UnionType:
        return " or ".join(_expected(arg) for arg in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a tuple of {get_args(kind)[0].__name__}"
    name = kind.__name__
    return _EXPECTED.get(kind) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
