"""Numbers as int8 and what one of them stands for: symmetric, so that 0 stays 0."""

import jax
import jax.numpy as jnp


def to_int8(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Whole numbers up to 127, and float32 scales, one for all that lie along `axes`.

    Returns:
      int8 in the shape of `x`, and scales in that shape without `axes`; `values * scales` differ
      from `x` by half a scale at most.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, axes)
