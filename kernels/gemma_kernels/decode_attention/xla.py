"""A decoding step in plain XLA, for any backend.

Query heads and new tokens that share a key head are rows of one matrix, `[B, K, rows, H]`; heads
and batch are batch dimensions of both products, as the cache has them, so nothing is transposed.
Scales of an int8 cache act on the scores and on the weights, not on the cache.

Local letters: R rows: query heads and new tokens of a key head.
"""

import jax
import jax.numpy as jnp
from jax import lax

from gemma_kernels.attention.mask import visible
from gemma_kernels.attention.spec import AttentionSpec


def decode_attention_xla(
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
    """Same results as `reference.decode_attention_reference`."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    G = N // K
    scaled = k_scale_BKS is not None
    dtype = q_BTNH.dtype if scaled else jnp.promote_types(q_BTNH.dtype, k_BKSH.dtype)

    q_BKRH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 3).reshape(B, K, G * T, H)
    s_BKRS = _batched("RH,SH->RS", q_BKRH.astype(dtype), k_BKSH.astype(dtype))
    s_BKRS = s_BKRS * (spec.scale if not scaled else spec.scale * k_scale_BKS[:, :, None])
    if not spec.softmax_in_float32:
        s_BKRS = s_BKRS.astype(q_BTNH.dtype).astype(jnp.float32)
    if spec.soft_cap is not None:
        s_BKRS = spec.soft_cap * jnp.tanh(s_BKRS / spec.soft_cap)
    seen_B1RS = jnp.tile(visible(lo_BT, hi_BT, kv_pos_BS), (1, G, 1))[:, None]
    some_BKR1 = jnp.any(seen_B1RS, axis=-1, keepdims=True)
    s_BKRS = jnp.where(seen_B1RS, s_BKRS, -jnp.inf)
    top_BKR1 = lax.stop_gradient(jnp.max(s_BKRS, axis=-1, keepdims=True))
    p_BKRS = jnp.exp(s_BKRS - jnp.where(some_BKR1, top_BKR1, 0.0))
    total_BKR1 = jnp.sum(p_BKRS, axis=-1, keepdims=True)
    safe_BKR1 = jnp.where(some_BKR1, total_BKR1, 1.0)
    if scaled:
        p_BKRS = p_BKRS * v_scale_BKS[:, :, None]
    out_BKRH = _batched("RS,SH->RH", p_BKRS.astype(dtype), v_BKSH.astype(dtype))
    out_BKRH = (out_BKRH / safe_BKR1).astype(q_BTNH.dtype)
    out_BTNH = jnp.moveaxis(out_BKRH.reshape(B, K, G, T, H), 3, 1).reshape(B, T, N, H)
    if not return_lse:
        return out_BTNH
    lse_BKR = (top_BKR1 + jnp.log(safe_BKR1))[..., 0]
    return out_BTNH, jnp.moveaxis(lse_BKR.reshape(B, K, G, T), 3, 1).reshape(B, T, N)


def _batched(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two batches of matrices `[B, K, ...]`, in float32.

    Its operands have no axes of size 1: XLA's CPU backend would take them out, and copy a cache
    that is written in one shape and multiplied in another.
    """
    unit = [axis for axis in (0, 1) if b.shape[axis] == 1]
    kept = "".join(letter for axis, letter in enumerate("BK") if axis not in unit)
    left, right, result = equation.replace("->", ",").split(",")
    out = jnp.einsum(
        f"{kept}{left},{kept}{right}->{kept}{result}",
        a.squeeze(unit),
        b.squeeze(unit),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.expand_dims(out, unit)
