"""The definition of attention here: dense, float32, no tricks."""

import jax
import jax.numpy as jnp
from jax.lax import Precision

from gemma_kernels.attention.mask import visible
from gemma_kernels.attention.spec import AttentionSpec


def attention_scores(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
) -> jax.Array:
    """What goes into the softmax, float32 `[B, N, T, S]`; -inf where a query does not see a key.

    Query head `n` reads key/value head `n // (N / K)`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores_BKGTS = spec.scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32), precision=Precision.HIGHEST
    )
    if spec.soft_cap is not None:
        scores_BKGTS = spec.soft_cap * jnp.tanh(scores_BKGTS / spec.soft_cap)
    seen_B11TS = visible(lo_BT, hi_BT, kv_pos_BS)[:, None, None]
    return jnp.where(seen_B11TS, scores_BKGTS, -jnp.inf).reshape(B, N, T, S)


def attention_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
) -> jax.Array:
    """Attention probabilities, float32 `[B, N, T, S]`; 0 for a query that sees no key."""
    scores_BNTS = attention_scores(q_BTNH, k_BSKH, lo_BT, hi_BT, kv_pos_BS, spec)
    seen_BNTS = scores_BNTS > -jnp.inf
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1, where=seen_BNTS)
    return jnp.where(seen_BNTS, weights_BNTS, 0.0)


def attention_reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    *,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Weighted sum of values, `[B, T, N, H]` in the dtype of the queries.

    With `return_lse` also the logarithm of the softmax's denominator, float32 `[B, T, N]`, -inf for
    a query that sees no key.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    weights_BNTS = attention_weights(q_BTNH, k_BSKH, lo_BT, hi_BT, kv_pos_BS, spec)
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights_BNTS.reshape(B, K, N // K, T, S),
        v_BSKH.astype(jnp.float32),
        precision=Precision.HIGHEST,
    )
    out_BTNH = out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
    if not return_lse:
        return out_BTNH
    scores_BNTS = attention_scores(q_BTNH, k_BSKH, lo_BT, hi_BT, kv_pos_BS, spec)
    return out_BTNH, jnp.moveaxis(jax.nn.logsumexp(scores_BNTS, axis=-1), 1, 2)
