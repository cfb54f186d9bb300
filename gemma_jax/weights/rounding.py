"""Rounds matrices to whole numbers with a scale for every few inputs.

The rule is that of compressed-tensors' symmetric schemes, and of Qwix but for rounding: codes use
all of their range, so that the largest value of a group is half a step off, as any other may be.

Local letters: O outputs; I inputs.
"""

import jax
import jax.numpy as jnp


def round_to_groups(w_OI: jax.Array, bits: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Rounds `[..., O, I]` to codes, with a scale per row and `group` neighbouring inputs.

    Args:
      bits: 4 or 8.
      group: Divides I.

    Returns:
      int4 or int8 `[..., O, I]`, `clip(round(w / scale))` with halves to even, and float32
      `[..., O, I // group]`, `max |w| / 7.5` or `/ 127.5`; 1 where a group is all zeros.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gemma_jax.weights.rounding import round_to_groups
      >>> codes, scale = round_to_groups(jnp.array([[3.0, -1.5, 0.0, 0.4]]), 4, 2)
      >>> codes.tolist(), [round(float(7.5 * x), 3) for x in scale[0]]
      ([[7, -4, 0, 7]], [3.0, 0.4])
    """
    most = 2 ** (bits - 1)
    groups = w_OI.astype(jnp.float32).reshape(*w_OI.shape[:-1], -1, group)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    # Behind the barrier it is no constant: XLA would multiply by its rounded reciprocal.
    steps = jax.lax.optimization_barrier(jnp.float32(most - 0.5))
    scale = jnp.where(largest == 0, 1.0, largest / steps)
    codes = jnp.clip(jnp.round(groups / scale[..., None]), -most, most - 1)
    return codes.astype(jnp.int4 if bits == 4 else jnp.int8).reshape(w_OI.shape), scale
