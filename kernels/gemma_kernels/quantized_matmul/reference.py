"""The definition: the product with the widened matrix, in float32.

Local letters: R rows of activations; I inputs; O outputs.
"""

import jax
import jax.numpy as jnp

from gemma_kernels.quantized_matmul.form import COLUMNS, QuantizedMatrix


def quantized_matmul_reference(
    x_RI: jax.Array, w: QuantizedMatrix, *, activations: str = "float"
) -> jax.Array:
    """`x @ w.T`, `[R, O]` in the dtype of `x`."""
    x_wide = x_RI.astype(jnp.float32)
    if activations == "int8":
        x_wide = rounded_to_int8(x_wide)
    y_RO = jnp.dot(x_wide, w.dense().T, precision=jax.lax.Precision.HIGHEST)
    return y_RO.astype(x_RI.dtype)


def rounded_to_int8(x_RI: jax.Array) -> jax.Array:
    """Activations as integer products take them: a scale per 32 of a row, `max |x| / 127`."""
    groups = x_RI.reshape(*x_RI.shape[:-1], -1, COLUMNS)
    scale = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / 127
    codes = jnp.round(groups / jnp.where(scale == 0, 1, scale))
    return (codes * scale).reshape(x_RI.shape)
