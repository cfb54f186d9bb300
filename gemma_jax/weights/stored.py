"""Weights stored narrower than the arithmetic: bfloat16 in memory, float32 in use.

Decoding on a CPU is bound by reading the weights, so half of the bytes is close to twice the speed,
if XLA never writes the widened weights back to memory. Which form of the product achieves that was
measured (`gemma_jax/benchmarks`), hence the three ways of `contract`.

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
    """A weight in bfloat16, with output letters first.

    Attributes:
      bits: bfloat16 as its uint16 bits: XLA's CPU backend widens these in place, but converts whole
        stacks of bfloat16.
    """

    bits: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        return self.bits.shape

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows along the first axis, widened to float32."""
        return _widen(lookup(self.bits, ids))

    def dense(self) -> jax.Array:
        """The array, widened to float32."""
        return _widen(self.bits)

    def take(self, axis: int, index: Index) -> "StoredWeight":
        """See `StandIn`."""
        return StoredWeight(take(self.bits, axis, index))

    def array_dims(self, dims: str) -> "StoredWeight":
        """See `StandIn`."""
        return StoredWeight(dims)  # pyright: ignore[reportArgumentType]

    def head_rows(self) -> jax.Array:
        """The array in bfloat16."""
        return _as_bfloat16(self.bits)

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """`einsum(equation, x, self)`, summed in float32, returned in the dtype of `x`."""
        letters_x, dims, result = equation.replace("->", ",").split(",")
        inputs = [letter for letter in dims if letter not in result]
        free = len(letters_x) - len(inputs)
        outputs = len(dims) - len(inputs)
        rows_RI = x.reshape(math.prod(x.shape[:free]), -1)
        w_OI = self.bits.reshape(math.prod(self.bits.shape[:outputs]), -1)
        if target_platform() != "tpu":
            # Ties the weights to this step's activations: XLA would otherwise widen them once,
            # outside the token loop, and keep the float32 copy. For TPUs it does not, but would
            # write a layer's weights out before it multiplies what is tied.
            w_OI, rows_RI = jax.lax.optimization_barrier((w_OI, rows_RI))
        if target_platform() == "cpu":
            y_RO = _matmul(rows_RI.astype(jnp.float32), w_OI)
        else:  # accelerators widen while they multiply
            w_OI = _as_bfloat16(w_OI).astype(x.dtype)
            exact = "highest" if x.dtype == jnp.float32 else "default"
            y_RO = jnp.dot(rows_RI, w_OI.T, precision=exact, preferred_element_type=jnp.float32)
        shape = x.shape[:free] + self.bits.shape[:outputs]
        return y_RO.reshape(shape).astype(x.dtype)


def _as_bfloat16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _widen(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


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
