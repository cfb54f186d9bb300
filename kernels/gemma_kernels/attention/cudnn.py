"""cuDNN's attention through `jax.nn.dot_product_attention`, where it computes what is asked for."""

import jax
import jax.numpy as jnp

from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.platform import require


def attention_cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lo_BT: jax.Array | None,
    hi_BT: jax.Array | None,
    kv_pos_BS: jax.Array | None,
    spec: AttentionSpec,
    *,
    return_lse: bool = False,
) -> jax.Array:
    """Same result as `reference.attention_reference`, for masks that are known at trace time.

    Raises:
      NotImplementedError: A call that cuDNN does not serve; says why.
    """
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    require("gpu")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries are {q_BTNH.dtype}; it takes bfloat16 and float16")
    if not (spec.causal or not spec.masked):
        raise NotImplementedError("the mask is data; it takes a causal mask, a window, or none")
    if spec.causal and T != S:
        raise NotImplementedError(f"its causal mask is aligned at the start; {T=} and {S=} differ")
    if spec.soft_cap is not None:
        raise NotImplementedError("it has no soft cap")
    if not spec.softmax_in_float32:
        raise NotImplementedError("its softmax is in float32 only")
    if H > 256 or H % 8:
        raise NotImplementedError(f"heads are {H} wide; it takes multiples of 8 up to 256")
    if return_lse:
        raise NotImplementedError(f"jax.nn rounds its log-sum-exp to {q_BTNH.dtype}")
    window = spec.window if spec.window is not None and spec.window < S else None
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH.astype(q_BTNH.dtype),
        v_BSKH.astype(q_BTNH.dtype),
        scale=spec.scale,
        is_causal=spec.causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
