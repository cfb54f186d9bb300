"""Marks that several files use."""

import pytest


def nightly(*values) -> list:
    """Parameters that are proven at night alone: others stand for them by day.

    Each is one value, or a tuple of values for several arguments.
    """
    rows = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*row, marks=pytest.mark.nightly) for row in rows]
