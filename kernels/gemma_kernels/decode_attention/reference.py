"""The definition of a decoding step: `attention`'s, over a cache with heads in front."""

import jax
import jax.numpy as jnp

from gemma_kernels.attention.reference import attention_reference
from gemma_kernels.attention.spec import AttentionSpec


def decode_attention_reference(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    *,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Weighted sum of values, `[B, T, N, H]` in the dtype of the queries.

    With `return_lse` also the logarithm of the softmax's denominator, float32 `[B, T, N]`, -inf for
    a query that sees no key.
    """
    k_BSKH = jnp.moveaxis(dequantise(k_BKSH, k_scale_BKS), 1, 2)
    v_BSKH = jnp.moveaxis(dequantise(v_BKSH, v_scale_BKS), 1, 2)
    mask = (lo_BT, hi_BT, kv_pos_BS)
    return attention_reference(q_BTNH, k_BSKH, v_BSKH, *mask, spec, return_lse=return_lse)


def dequantise(x_BKSH: jax.Array, scale_BKS: jax.Array | None) -> jax.Array:
    """float32; a scale belongs to one token's head."""
    x_BKSH = x_BKSH.astype(jnp.float32)
    return x_BKSH if scale_BKS is None else x_BKSH * scale_BKS[..., None]
