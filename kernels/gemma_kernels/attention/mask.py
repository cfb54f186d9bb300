"""Masks as data: per query, one interval of key positions.

Query `t` of row `b` sees exactly the keys whose position lies in `[lo_BT[b, t], hi_BT[b, t])`.
Keys carry explicit positions, so padding, ring caches and chunks need no further rule: an empty
or padded slot has position -1 and is never seen.

Every mask of the Gemma family is of this kind, with `lo` and `hi` ascending along a row:

    causal              [0, p + 1)
    sliding window      [p - w + 1, p + 1)
    images              hi is the end of the token's image, if it is in one; lo stays, so a window
                        cuts off what lies before in an image as elsewhere
    packed documents    lo is at least the start of the token's document; positions count along the
                        row, through all documents (those of the rotary embedding start over)
    both ways           [p - w, p + w + 1), as in the embedding models

What would not be an interval: two images that see each other but not the text between them, or
documents whose tokens alternate. No Gemma has either; `causal_interval` cannot say them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """Which keys each query sees: those with a position in its interval.

    Attributes:
      lo_BT, hi_BT: int32; query `t` sees the keys with position in `[lo, hi)`.
      kv_pos_BS: int32 positions of the keys, -1 for slots that no query may see.

    Examples:
      >>> import jax.numpy as jnp
      >>> pos_BT = jnp.arange(8)[None]
      >>> mask = Mask(*causal_interval(pos_BT, window=4), pos_BT)
      >>> visible(*mask).sum()
      Array(26, dtype=int32)
    """

    lo_BT: jax.Array
    hi_BT: jax.Array
    kv_pos_BS: jax.Array


def causal_interval(
    pos_BT: jax.Array,
    window: int | None = None,
    last_BT: jax.Array | None = None,
    first_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`[lo, hi)` of key positions seen by queries at `pos_BT`; -1 marks padding, which sees none.

    A query sees itself and the keys before it; with `window`, only the last `window` of those,
    itself included (transformers `masking_utils.sliding_window_overlay`: `k > q - window`). A query
    inside a block also sees the rest of its block, up to `last_BT` (see `last_of_block`); one in a
    packed document sees nothing before `first_BT` (see `first_of_document`).
    """
    lo_BT = jnp.zeros_like(pos_BT) if window is None else jnp.maximum(pos_BT - window + 1, 0)
    if first_BT is not None:
        lo_BT = jnp.maximum(lo_BT, first_BT)
    hi_BT = (pos_BT if last_BT is None else jnp.maximum(pos_BT, last_BT)) + 1
    return lo_BT, hi_BT


def two_sided_interval(
    pos_BT: jax.Array, reach: int | None = None, first_BT=None, last_BT=None
) -> tuple[jax.Array, jax.Array]:
    """`[lo, hi)` of an encoder: `reach` keys to either side, or all of them.

    `first_BT` and `last_BT` bound a packed document. Padding (-1) sees nothing.
    """
    far = jnp.iinfo(pos_BT.dtype).max - 1
    lo_BT = jnp.zeros_like(pos_BT) if reach is None else jnp.maximum(pos_BT - reach, 0)
    hi_BT = jnp.full_like(pos_BT, far) if reach is None else pos_BT + reach + 1
    if first_BT is not None:
        lo_BT = jnp.maximum(lo_BT, first_BT)
    if last_BT is not None:
        hi_BT = jnp.minimum(hi_BT, last_BT + 1)
    return lo_BT, jnp.where(pos_BT < 0, 0, hi_BT)


def causal_rows(B: int, T: int, S: int, window: int | None) -> Mask:
    """The mask of what `AttentionSpec.causal` states."""
    pos_BT = jnp.broadcast_to(jnp.arange(S - T, S, dtype=jnp.int32), (B, T))
    kv_pos_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    return Mask(*causal_interval(pos_BT, window), kv_pos_BS)


def everything(B: int, T: int, S: int) -> Mask:
    """The mask under which every query sees every key."""
    kv_pos_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    return Mask(jnp.zeros((B, T), jnp.int32), jnp.full((B, T), S, jnp.int32), kv_pos_BS)


def first_of_document(document_BT: jax.Array) -> jax.Array:
    """Row of the first token of each token's document, for packed rows.

    Args:
      document_BT: Number of the document of each token of a row, ascending; its tokens lie side by
        side. Masks of packed rows count positions along the row: `pos_BT = arange(T)`.
    """
    row_T = jnp.arange(document_BT.shape[1], dtype=jnp.int32)
    before_BT = jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = document_BT != before_BT
    return jax.lax.cummax(jnp.where(starts_BT, row_T, 0), axis=1)


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
