"""A linear map declared by its equation."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.dims import weight_dims
from gemma_jax.weights.contract import contract, contracted


class Einsum(nnx.Module):
    """`y = einsum(equation, x, w)`, plus a bias if asked for.

    The Param remembers its letters as `dims`, and those it sums over as `inputs`. Weights are
    declared output letters first (`"BTD,FD->BTF"`), the memory order of published checkpoints:
    loading is a reshape, and a matrix-vector product reads each row in one sweep.
    """

    def __init__(
        self, equation: str, sizes: Mapping[str, int], *, bias: bool = False, rngs: nnx.Rngs
    ):
        dims, inputs = weight_dims(equation), contracted(equation)
        outputs = dims.removesuffix(inputs)
        shape = tuple(sizes[letter] for letter in dims)
        fan_in = math.prod(sizes[letter] for letter in inputs)
        self.equation = equation
        self.w = nnx.Param(rngs.normal(shape) * fan_in**-0.5, dims=dims, inputs=inputs)
        self.bias = nnx.Param(jnp.zeros(shape[: len(outputs)]), dims=outputs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = contract(self.equation, x, self.w.get_value())
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
