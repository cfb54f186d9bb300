"""A linear map declared by its equation."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.dims import weight_dims


def contract(equation: str, x: jax.Array, w: Any) -> jax.Array:
    """`einsum(equation, x, w)` in the dtype of `x`, with full float32 products in float32.

    A weight is an array, or an object that brings its own `contract` (see `quant.py`).
    """
    if not isinstance(w, jax.Array):
        return w.contract(equation, x)
    return jnp.einsum(equation, x, w.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


class Einsum(nnx.Module):
    """`y = einsum(equation, x, w)`.

    The Param remembers its letters as `dims`, and those it sums over as `inputs`. Weights are
    declared output letters first (`"BTD,FD->BTF"`), the memory order of published checkpoints:
    loading is a reshape, and a matrix-vector product reads each row in one sweep.
    """

    def __init__(self, equation: str, sizes: Mapping[str, int], *, rngs: nnx.Rngs):
        dims = weight_dims(equation)
        result = equation.partition("->")[2]
        inputs = "".join(letter for letter in dims if letter not in result)
        shape = tuple(sizes[letter] for letter in dims)
        fan_in = math.prod(sizes[letter] for letter in inputs)
        self.equation = equation
        self.w = nnx.Param(rngs.normal(shape) * fan_in**-0.5, dims=dims, inputs=inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return contract(self.equation, x, self.w.get_value())
