"""Rotary position embedding, half-split pairs, optionally with linearly scaled positions."""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.numerics import Numerics

RopeTable = tuple[jax.Array, jax.Array]  # cos, sin, each [B, T, H/2] in float32


def rope_table(
    pos_BT: jax.Array,
    head_dim: int,
    theta: float,
    scale: float,
    numerics: Numerics,
    share: float = 1.0,
) -> RopeTable:
    """Cosine and sine of the angles `pos * theta^(-2i/H) / scale`, in radians.

    At position 131,072 one unit in the last place of a float32 angle is 0.008 rad, so the order of
    the roundings is part of the definition: hf rounds the inverse frequency and multiplies, gdm
    divides (`numerics.divide_positions`).

    Args:
      share: Of the pairs, those with the shortest wavelengths turn; the angle of the others is 0.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    timescale = np.float32(theta) ** exponent
    pos_BT1 = pos_BT[..., None].astype(jnp.float32)
    if numerics.divide_positions:
        angle_BTh = pos_BT1 / timescale / np.float32(scale)
    else:
        angle_BTh = pos_BT1 * (np.float32(1) / timescale / np.float32(scale))
    if (turning := int(share * head_dim // 2)) < head_dim // 2:
        angle_BTh = jnp.where(np.arange(head_dim // 2) < turning, angle_BTh, 0)
    return jnp.cos(angle_BTh), jnp.sin(angle_BTh)


def rotate(x_BTNH: jax.Array, table: RopeTable, numerics: Numerics) -> jax.Array:
    """Rotates the pairs `(i, i + H/2)` of each head; shape and dtype stay."""
    dtype = jnp.float32 if numerics.rotate_in_float32 else x_BTNH.dtype
    cos_BT1h, sin_BT1h = (x_BTh[:, :, None].astype(dtype) for x_BTh in table)
    a_BTNh, b_BTNh = jnp.split(x_BTNH.astype(dtype), 2, axis=-1)
    out_BTNH = jnp.concatenate(
        [a_BTNh * cos_BT1h - b_BTNh * sin_BT1h, b_BTNh * cos_BT1h + a_BTNh * sin_BT1h], axis=-1
    )
    return out_BTNH.astype(x_BTNH.dtype)
