"""Weights stored narrower than the arithmetic: bfloat16 or int8 in memory, float32 in use.

Decoding on a CPU is bound by reading the weights, so half or a quarter of the bytes is close to
twice or thrice the speed, if XLA never writes the widened weights back to memory. Which form of
the product achieves that was measured (`gemma_jax/benchmarks`), hence the three ways of `contract`.

Local letters: R rows; O outputs; I inputs of one product.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gemma_jax.compat import fuses_matrix_vector
from gemma_jax.weights.contract import matrix_vector
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import Index, StandIn, take
from gemma_kernels.platform import target_platform

VECTOR_ROWS = 4  # up to here, one matrix-vector product per row of x
TILE_ROWS = 64  # up to here, large matrices are widened tile by tile
WHOLE_BYTES = 64 << 20  # a widened matrix up to this size may exist as a whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredWeight(StandIn):
    """A weight with output letters first.

    Attributes:
      values: bfloat16 as its uint16 bits (XLA's CPU backend widens these in place, but converts
        whole stacks of bfloat16), or int8.
      scale: float32 factor per output channel for int8, `None` for bfloat16.
    """

    values: jax.Array
    scale: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        return self.values.shape

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows along the first axis, widened to float32."""
        rows = _widen(lookup(self.values, ids))
        return rows if self.scale is None else _scaled(rows, self.scale[ids])

    def dense(self) -> jax.Array:
        """The array, widened to float32."""
        wide = _widen(self.values)
        return wide if self.scale is None else _scaled(wide, self.scale)

    def take(self, axis: int, index: Index) -> "StoredWeight":
        """See `StandIn`; scales go along where the axis is one of outputs."""
        values, scale = take(self.values, axis, index), self.scale
        place = axis + self.values.ndim
        if scale is not None and place < scale.ndim:
            scale = take(scale, place, index)
        return StoredWeight(values, scale)

    def array_dims(self, dims: str) -> "StoredWeight":
        """See `StandIn`."""
        if self.scale is None:
            return StoredWeight(dims, None)  # pyright: ignore[reportArgumentType]
        stacked = self.values.ndim - len(dims)
        return StoredWeight(dims, dims[: self.scale.ndim - stacked])  # pyright: ignore[reportArgumentType]

    def scaled_rows(self) -> tuple[jax.Array, jax.Array | None]:
        """The weight as an array of bfloat16, or as one of int8 and its scales."""
        return self._narrow(self.values), self.scale

    def _narrow(self, values: jax.Array) -> jax.Array:
        if self.scale is None:
            return jax.lax.bitcast_convert_type(values, jnp.bfloat16)
        return values

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """`einsum(equation, x, self)`, summed in float32, returned in the dtype of `x`."""
        letters_x, dims, result = equation.replace("->", ",").split(",")
        inputs = [letter for letter in dims if letter not in result]
        free = len(letters_x) - len(inputs)
        outputs = len(dims) - len(inputs)
        rows_RI = x.reshape(math.prod(x.shape[:free]), -1)
        w_OI = self.values.reshape(math.prod(self.values.shape[:outputs]), -1)
        if target_platform() != "tpu":
            # Ties the weights to this step's activations: XLA would otherwise widen them once,
            # outside the token loop, and keep the float32 copy. For TPUs it does not, but would
            # write a layer's weights out before it multiplies what is tied.
            w_OI, rows_RI = jax.lax.optimization_barrier((w_OI, rows_RI))
        if target_platform() == "cpu":
            y_RO = _matmul(rows_RI.astype(jnp.float32), w_OI)
        else:  # accelerators widen while they multiply
            w_OI = self._narrow(w_OI).astype(x.dtype)
            exact = "highest" if x.dtype == jnp.float32 else "default"
            y_RO = jnp.dot(rows_RI, w_OI.T, precision=exact, preferred_element_type=jnp.float32)
        if self.scale is not None:
            y_RO = y_RO * self.scale.reshape(-1)
        shape = x.shape[:free] + self.values.shape[:outputs]
        return y_RO.reshape(shape).astype(x.dtype)


def _scaled(wide: jax.Array, scale: jax.Array) -> jax.Array:
    """`wide`, times factors along its first axes."""
    return wide * scale.reshape(scale.shape + (1,) * (wide.ndim - scale.ndim))


def _widen(values: jax.Array) -> jax.Array:
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    return values.astype(jnp.float32)


def _matmul(rows_RI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """`rows_RI @ widen(w_OI).T`."""
    R, (O, I) = len(rows_RI), w_OI.shape
    if R <= VECTOR_ROWS and fuses_matrix_vector():
        rows = []
        for r in range(R):  # the barrier keeps XLA from merging them into one product of matrices
            rows.append(matrix_vector(w_OI, rows_RI[r], _widen))
            w_OI, _ = jax.lax.optimization_barrier((w_OI, rows[-1]))
        return jnp.stack(rows)
    if R > TILE_ROWS or 4 * O * I <= WHOLE_BYTES:
        return jnp.dot(rows_RI, _widen(w_OI).T)
    tiles = w_OI.reshape(-1, math.gcd(O, 512), I)
    y_OR = jax.lax.map(lambda tile: jnp.dot(_widen(tile), rows_RI.T), tiles)
    return y_OR.reshape(O, R).T
