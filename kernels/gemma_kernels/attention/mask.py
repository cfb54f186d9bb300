"""Masks as data: per query, one interval of key positions.

Query `t` of row `b` sees exactly the keys whose position lies in `[lo_BT[b, t], hi_BT[b, t])`.
Keys carry explicit positions, so padding, ring caches and chunks need no further rule: an empty
or padded slot has position -1 and is never seen.
"""

import jax
import jax.numpy as jnp


def causal_interval(
    pos_BT: jax.Array, window: int | None = None, last_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`[lo, hi)` of key positions seen by queries at `pos_BT`; -1 marks padding, which sees none.

    A query sees itself and the keys before it; with `window`, only the last `window` of those,
    itself included (transformers `masking_utils.sliding_window_overlay`: `k > q - window`). A query
    inside a block also sees the rest of its block, up to `last_BT` (see `last_of_block`).
    """
    lo_BT = jnp.zeros_like(pos_BT) if window is None else jnp.maximum(pos_BT - window + 1, 0)
    hi_BT = (pos_BT if last_BT is None else jnp.maximum(pos_BT, last_BT)) + 1
    return lo_BT, hi_BT


def last_of_block(pos_BT: jax.Array, block_BT: jax.Array) -> jax.Array:
    """Position of the last token of each token's block, -1 outside of blocks.

    Tokens of a block (an image) see each other both ways. So the mask stays an interval: the
    earlier ones of its block are before a token anyway, and a window cuts those off in both cases
    (transformers `masking_utils`, `(causal or same block) and k > q - window`).

    Args:
      pos_BT: Ascending along each row; the tokens of a block lie side by side.
      block_BT: Number of the block, 0 for none.
    """
    following_BT = jnp.pad(block_BT[:, 1:], ((0, 0), (0, 1)))
    ends_BT = (block_BT != following_BT) & (block_BT > 0)
    far = jnp.iinfo(pos_BT.dtype).max
    last_BT = jax.lax.cummin(jnp.where(ends_BT, pos_BT, far), axis=1, reverse=True)
    return jnp.where(block_BT > 0, last_BT, -1)


def visible(lo_BT: jax.Array, hi_BT: jax.Array, kv_pos_BS: jax.Array) -> jax.Array:
    """The mask written out, bool `[B, T, S]`: small tiles and the reference only."""
    kv_pos_B1S = kv_pos_BS[:, None, :]
    inside = (kv_pos_B1S >= lo_BT[:, :, None]) & (kv_pos_B1S < hi_BT[:, :, None])
    return inside & (kv_pos_B1S >= 0)
