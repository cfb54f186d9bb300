"""The product in plain XLA, for any backend.

Local letters: R rows of activations; I inputs; O outputs.
"""

import jax
import jax.numpy as jnp

from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.reference import rounded_to_int8


def quantized_matmul_xla(
    x_RI: jax.Array, w: QuantizedMatrix, *, activations: str = "float"
) -> jax.Array:
    """Same results as `reference.quantized_matmul_reference`, for bfloat16 in bfloat16."""
    exact = x_RI.dtype == jnp.float32
    if activations == "int8":
        x_RI = rounded_to_int8(x_RI.astype(jnp.float32)).astype(x_RI.dtype)
    y_RO = jnp.dot(
        x_RI,
        w.dense().astype(x_RI.dtype).T,
        precision="highest" if exact else "default",
        preferred_element_type=jnp.float32,
    )
    return y_RO.astype(x_RI.dtype)
