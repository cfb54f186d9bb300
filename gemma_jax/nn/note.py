"""What an intermediate result passes on its way: a place to read it, and to put another there."""

from collections.abc import Callable

import jax

Note = Callable[[str, jax.Array], jax.Array]  # name and value -> the value to go on with


def unnoted(_: str, x: jax.Array) -> jax.Array:
    """The value itself, which nobody wants to see."""
    return x
