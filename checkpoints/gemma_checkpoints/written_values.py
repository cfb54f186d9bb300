"""Writes down what modules keep besides arrays, so that it can be compared another day."""

import sys
from collections.abc import Mapping
from functools import partial, reduce
from inspect import ismethod
from typing import Any

NAMELESS = "a function that no name tells from others"


def written(value: Any) -> str | None:
    """A plain value, or the name of a function or class, also in tuples, lists and dicts.

    Of a function its name is compared, not its code, as with the classes of modules.

    Returns:
      Text that is the same in every process; `NAMELESS` is a part of it where a function has no
      name that leads to it: a lambda, what is defined inside of a function, a method that is bound
      to some object. `None` for other values, which may look another way tomorrow.

    Examples:
      >>> import jax
      >>> written((1.5, jax.nn.relu)), written(lambda x: x) == NAMELESS
      ('(1.5, jax.relu)', True)
    """
    if isinstance(value, tuple | list):
        parts = [written(one) for one in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if isinstance(value, Mapping):
        parts = {str(key): written(one) for key, one in value.items()}
        known = None not in parts.values()
        return ", ".join(f"{key}={part}" for key, part in sorted(parts.items())) if known else None
    if isinstance(value, partial):
        called = written((value.func, *value.args)), written(value.keywords)
        return NAMELESS if None in called else f"partial{called[0]} with {called[1] or 'nothing'}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return _name(value) if callable(value) else None


def _name(value: Any) -> str:
    """Of a function or class: where it lies, if it can be found there."""
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if ismethod(value) or module not in sys.modules or name is None:
        return NAMELESS
    try:
        found = reduce(getattr, name.split("."), sys.modules[module])
    except AttributeError:  # of a lambda, of what is local to a function
        return NAMELESS
    # Packages that hide modules in `_src` move them from version to version.
    return f"{module.split('._src')[0]}.{name}" if found is value else NAMELESS
