"""What a decoding step may ask for. Its static facts are an `AttentionSpec`."""

import jax
import jax.numpy as jnp

from gemma_kernels.attention.spec import AttentionSpec

MOST_TOKENS = 16  # new tokens of a step


def check_operands(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    k_scale_BKS: jax.Array | None,
    v_scale_BKS: jax.Array | None,
    stacked: bool = False,
) -> None:
    """Raises `ValueError` unless the operands of `decode_attention` fit together."""
    for name, array, more in (
        ("q_BTNH", q_BTNH, 0), ("k_BKSH", k_BKSH, stacked), ("v_BKSH", v_BKSH, stacked)
    ):  # fmt: skip
        if array.ndim != 4 + more:
            few = "five dimensions, as a layer is given" if more else "four dimensions"
            raise ValueError(f"{name} has shape {array.shape}; it needs {few}")
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[-3:-1]
    layers = k_BKSH.shape[:-4]
    expected = {
        "k_BKSH": (k_BKSH, (*layers, B, K, S, H)),
        "v_BKSH": (v_BKSH, (*layers, B, K, S, H)),
        "lo_BT": (lo_BT, (B, T)),
        "hi_BT": (hi_BT, (B, T)),
        "kv_pos_BS": (kv_pos_BS, (B, S)),
    }
    scales = {"k_scale_BKS": k_scale_BKS, "v_scale_BKS": v_scale_BKS}
    integer = [jnp.issubdtype(x.dtype, jnp.integer) for x in (k_BKSH, v_BKSH)]
    given = [scale is not None for scale in scales.values()]
    if integer != given or len(set(given)) > 1:
        raise ValueError(
            f"keys are {k_BKSH.dtype}, values {v_BKSH.dtype}, scales given for "
            f"{[name for name, scale in scales.items() if scale is not None]}; int8 caches need "
            "k_scale_BKS and v_scale_BKS, others take none"
        )
    if given[0]:
        expected |= {name: (scale, (*layers, B, K, S)) for name, scale in scales.items()}
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}; with q {q_BTNH.shape} it needs {shape}"
            )
    if N % K:
        raise ValueError(f"query heads N={N} must be a multiple of key/value heads K={K}")
    if not 1 <= T <= MOST_TOKENS:
        raise ValueError(
            f"a decoding step has 1 to {MOST_TOKENS} new tokens, got {T=}; more go to attention"
        )
    if spec.causal or not spec.masked:
        raise ValueError(
            f"slots of a cache are in no order, and some are empty: the mask is lo, hi and "
            f"positions, not causal={spec.causal}, masked={spec.masked}"
        )
