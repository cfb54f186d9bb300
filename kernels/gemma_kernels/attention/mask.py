"""Masks as data: per query, one interval of key positions.

Query `t` of row `b` sees exactly the keys whose position lies in `[lo_BT[b, t], hi_BT[b, t])`.
Keys carry explicit positions, so padding, ring caches and chunks need no further rule: an empty
or padded slot has position -1 and is never seen.
"""

import jax
import jax.numpy as jnp


def causal_interval(pos_BT: jax.Array, window: int | None = None) -> tuple[jax.Array, jax.Array]:
    """`[lo, hi)` of key positions seen by queries at `pos_BT`; -1 marks padding, which sees none.

    A query sees itself and the keys before it; with `window`, only the last `window` of those,
    itself included (transformers `masking_utils.sliding_window_overlay`: `k > q - window`).
    """
    lo_BT = jnp.zeros_like(pos_BT) if window is None else jnp.maximum(pos_BT - window + 1, 0)
    hi_BT = pos_BT + 1
    return lo_BT, hi_BT


def visible(lo_BT: jax.Array, hi_BT: jax.Array, kv_pos_BS: jax.Array) -> jax.Array:
    """The mask written out, bool `[B, T, S]`: small tiles and the reference only."""
    kv_pos_B1S = kv_pos_BS[:, None, :]
    inside = (kv_pos_B1S >= lo_BT[:, :, None]) & (kv_pos_B1S < hi_BT[:, :, None])
    return inside & (kv_pos_B1S >= 0)
