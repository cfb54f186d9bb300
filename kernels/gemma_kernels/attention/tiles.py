"""Which tiles of queries and blocks of keys meet, from the intervals alone, on the device.

A tile of queries and a block of keys are compared by their bounds, never row by row, so that the
largest array is `[B, tiles, blocks]` of bits. "Some" may err on the side of meeting; "whole" (every
query of the tile sees every key of the block) may err on the side of not: kernels mask what is not
whole.
"""

import jax
import jax.numpy as jnp
import numpy as np

FAR = jnp.iinfo(jnp.int32).max


def visible_blocks(
    lo_BT, hi_BT, kv_pos_BS, q: int, k: int, *, unseeing: bool = True
) -> tuple[jax.Array, jax.Array]:
    """`some_Bij, whole_Bij` for tiles of `q` queries and blocks of `k` keys, which divide T and S.

    A query with an empty interval meets no block. With `unseeing` it keeps its tile from being
    whole; without, kernels must see to it that the query gets nothing.
    """
    B = len(lo_BT)
    lo_BiQ, hi_BiQ = (x.reshape(B, -1, 1, q) for x in (lo_BT, hi_BT))
    pos_BjK = kv_pos_BS.reshape(B, 1, -1, k)
    real_BjK = pos_BjK >= 0
    sees_BiQ = hi_BiQ > jnp.maximum(lo_BiQ, 0)
    least_Bj = jnp.min(jnp.where(real_BjK, pos_BjK, FAR), 3)
    most_Bj = jnp.max(pos_BjK, 3)
    some_Bij = (most_Bj >= jnp.min(jnp.where(sees_BiQ, lo_BiQ, FAR), 3)) & (
        least_Bj < jnp.max(jnp.where(sees_BiQ, hi_BiQ, -1), 3)
    )
    counts_BiQ = sees_BiQ | unseeing
    whole_Bij = least_Bj >= jnp.max(jnp.where(counts_BiQ, lo_BiQ, -1), 3)
    whole_Bij &= most_Bj < jnp.min(jnp.where(counts_BiQ, hi_BiQ, FAR), 3)
    return some_Bij, some_Bij & whole_Bij & jnp.all(real_BjK, 3)


def static_visible_blocks(
    T: int, S: int, q: int, k: int, causal: bool, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """`some_ij, whole_ij` where the spec states the mask: causal, at most `window`, or everything.

    Rows beyond `T` are left out of account; keys beyond `S` are seen by nobody.
    """
    first_q = S - T + np.arange(0, T, q)[:, None]
    last_q = np.minimum(first_q + q, S) - 1
    first_k = np.arange(0, S, k)[None]
    last_k = first_k + k - 1
    some_ij = np.full((first_q.size, first_k.size), True)
    whole_ij = some_ij & (last_k < S)
    if causal:
        some_ij, whole_ij = some_ij & (first_k <= last_q), whole_ij & (last_k <= first_q)
    if window is not None:
        some_ij &= last_k > first_q - window
        whole_ij &= first_k > last_q - window
    return some_ij, whole_ij


def bounds(some_Bij, whole_Bij) -> tuple[jax.Array, ...]:
    """int32 `[B, i]` first and last of `some`, first and last of `whole`; 0 and -1 for none.

    Those seen whole count only where they lie side by side. With the last two axes swapped: the
    tiles of queries that see a block of keys.
    """
    first_Bi, last_Bi = _ends(some_Bij)
    whole_first_Bi, whole_last_Bi = _ends(whole_Bij)
    together_Bi = jnp.sum(whole_Bij, 2) == whole_last_Bi - whole_first_Bi + 1
    return first_Bi, last_Bi, whole_first_Bi, jnp.where(together_Bi, whole_last_Bi, -1)


def _ends(flags_Bij) -> tuple[jax.Array, jax.Array]:
    any_Bi = jnp.any(flags_Bij, 2)
    last_Bi = flags_Bij.shape[2] - 1 - jnp.argmax(flags_Bij[:, :, ::-1], 2)
    first_Bi = jnp.where(any_Bi, jnp.argmax(flags_Bij, 2), 0)
    return first_Bi.astype(jnp.int32), jnp.where(any_Bi, last_Bi, -1).astype(jnp.int32)


def plain_windows(lo_BT, hi_BT, kv_pos_BS, q: int, offset: int, window: int) -> jax.Array:
    """1 for tiles whose queries see exactly the `window` key rows up to their own; int32 `[B, i]`.

    Then rows can be compared instead of positions, which are known at compile time. Query row `t`
    is key row `t + offset`.
    """
    B, T = lo_BT.shape
    row_T = offset + jnp.arange(T)
    oldest_T = row_T - window + 1
    own_BT, oldest_BT = (jnp.take(kv_pos_BS, r, axis=1, mode="clip") for r in (row_T, oldest_T))
    plain_BT = (lo_BT == oldest_BT) & (hi_BT == own_BT + 1) & (oldest_BT >= 0)
    plain_BT &= (oldest_T >= 0) & (row_T < kv_pos_BS.shape[1])
    # No key out of order may hide between the oldest and the own one.
    ascending_BS = jnp.pad(kv_pos_BS[:, 1:] > kv_pos_BS[:, :-1], ((0, 0), (1, 0)))
    breaks_BS = jnp.cumsum(~ascending_BS, axis=1)
    own_breaks_BT, oldest_breaks_BT = (
        jnp.take(breaks_BS, r, axis=1, mode="clip") for r in (row_T, oldest_T)
    )
    plain_BT &= own_breaks_BT == oldest_breaks_BT
    return jnp.all(plain_BT.reshape(B, -1, q), 2).astype(jnp.int32)
