"""The product in plain XLA, for any backend.

Local letters: R rows of activations; I inputs; O outputs; P pieces of the matrix.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from gemma_kernels.platform import target_platform
from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.reference import rounded_to_int8

CACHED = 2**20  # numbers of a widened matrix that a CPU keeps in its caches


def quantized_matmul_xla(
    x_RI: jax.Array, w: QuantizedMatrix, *, activations: str = "float"
) -> jax.Array:
    """Same results as `reference.quantized_matmul_reference`, for bfloat16 in bfloat16."""
    if activations == "int8":
        x_RI = rounded_to_int8(x_RI.astype(jnp.float32)).astype(x_RI.dtype)
    pieces = _pieces(w)
    if pieces is None:
        return _dot(x_RI, _widened(w, x_RI.dtype).T)
    y_PRO = jax.lax.map(lambda piece: _dot(x_RI, _widened(piece, x_RI.dtype).T), pieces)
    return jnp.moveaxis(y_PRO, 0, 1).reshape(x_RI.shape[0], -1)


def gradient_of_x(dy_RO: jax.Array, w: QuantizedMatrix) -> jax.Array:
    """`dy @ w`, `[R, I]`: what `x @ w.T` passes back to `x`."""
    pieces = _pieces(w)
    if pieces is None:
        return _dot(dy_RO, _widened(w, dy_RO.dtype))
    count = pieces.codes.shape[0]
    dy_PRO = jnp.moveaxis(dy_RO.reshape(dy_RO.shape[0], count, -1), 1, 0)
    parts = jax.lax.map(lambda p: _dot(p[0], _widened(p[1], p[0].dtype)), (dy_PRO, pieces))
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(dy_RO.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = "highest" if a.dtype == jnp.float32 else "default"
    y = jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(a.dtype)


def _widened(w: QuantizedMatrix, dtype: jnp.dtype) -> jax.Array:
    codes = w.whole_codes()
    if target_platform() == "cpu":
        # A row of codes at a time, written once. Else a product of one row takes them out of tiles
        # and bytes for every number it needs.
        codes = jax.lax.optimization_barrier(codes)
    return w.values(codes).astype(dtype)


def _pieces(w: QuantizedMatrix) -> QuantizedMatrix | None:
    """A large matrix as a stack of parts of its rows, for a CPU; `None`: take it whole."""
    if target_platform() != "cpu" or w.columns:
        return None
    rows, least = w.codes.shape[0], -(-w.shape[0] * w.shape[1] // CACHED)
    count = next((n for n in range(least, 4 * least) if rows % n == 0), 1)
    if count == 1:
        return None
    parts = {
        name: leaf.reshape(count, -1, *leaf.shape[1:])
        for name in ("codes", "scale", "offset")
        if (leaf := getattr(w, name)) is not None
    }
    if w.table is not None:
        parts["table"] = jnp.broadcast_to(w.table, (count, *w.table.shape))
    return replace(w, **parts)
