"""What a function computes on its way, without running it."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr


def largest_intermediate(function, *args) -> int:
    """Elements of the largest array of floats that an operation of the program returns."""
    return max(_sizes(jax.make_jaxpr(function)(*args).jaxpr))


def _sizes(jaxpr: Jaxpr) -> Iterator[int]:
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr):
                    yield from _sizes(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from _sizes(inner)
        for out in equation.outvars:
            if jnp.issubdtype(getattr(out.aval, "dtype", int), jnp.floating):
                yield math.prod(out.aval.shape)
