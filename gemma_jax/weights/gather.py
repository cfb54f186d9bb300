"""Rows of a table by index."""

import jax
import jax.numpy as jnp

from gemma_jax.weights.protocol import StandIn, Weight, entry_bits
from gemma_kernels.platform import target_platform

TILE_BITS = 256  # 64 rows of int4, 32 of int8, 16 of bfloat16: those that a TPU keeps together


def lookup(table: Weight, index: jax.Array) -> jax.Array:
    """`table[index]` along the first axis.

    XLA makes a slice of a lookup of one row, and for that gathers a table that is split over
    devices, or on a TPU brings one of int8 into another order, all of it at every step. So one row
    is read as one of two. A table of three axes, whose first one TPUs keep next to the last, they
    would bring into another order for any number of rows: it is read in tiles of rows, among which
    the row is chosen.
    """
    if isinstance(table, StandIn):
        return table.rows(index)
    if (platform := target_platform()) == "cpu":
        return table[index]
    packed = TILE_BITS // entry_bits(table.dtype)
    if platform == "tpu" and table.ndim == 3 and table.shape[0] % packed == 0:
        return _from_tiles(table, index, packed)
    if index.size > 1:
        return table[index]
    two = jnp.concatenate([index.ravel(), jnp.zeros(1, index.dtype)])
    return table[two][:1].reshape(*index.shape, *table.shape[1:])


def _from_tiles(table_VLP: jax.Array, index: jax.Array, packed: int) -> jax.Array:
    V, L, P = table_VLP.shape
    tiles = jnp.moveaxis(table_VLP, 1, 0).reshape(L, V // packed, packed, P)
    rows = tiles[:, index // packed]
    if entry_bits(rows.dtype) < 8:
        rows = rows.astype(jnp.int8)
    chosen = jnp.arange(packed)[:, None] == (index % packed)[..., None, None]
    row = jnp.sum(jnp.where(chosen, rows, 0), axis=-2, dtype=rows.dtype)
    return jnp.moveaxis(row, 0, -2).astype(table_VLP.dtype)
