"""One entry for every implementation."""

from collections.abc import Callable
from functools import partial

import jax

from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.decode_attention.reference import decode_attention_reference
from gemma_kernels.decode_attention.spec import check_operands
from gemma_kernels.decode_attention.xla import decode_attention_xla
from gemma_kernels.implementations import first_that_can
from gemma_kernels.platform import require, require_hopper


def _of_layer(implementation: Callable) -> Callable:
    """`implementation`, given the layer of a stack that is meant."""

    def decode_attention(q_BTNH, k_BKSH, v_BKSH, *mask, layer=None, **options):
        scales = {x: options[x] for x in SCALES if options.get(x) is not None}
        if layer is not None:
            at = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
            k_BKSH, v_BKSH = at(k_BKSH), at(v_BKSH)
            options |= {name: at(scale) for name, scale in scales.items()}
        return implementation(q_BTNH, k_BKSH, v_BKSH, *mask, **options)

    return decode_attention


def _tpu(*operands, **options) -> jax.Array | tuple[jax.Array, jax.Array]:
    require("tpu")
    # Pallas takes a while to import.
    from gemma_kernels.decode_attention.tpu import decode_attention_tpu

    return decode_attention_tpu(*operands, **options)


def _hopper(*operands, **options) -> jax.Array | tuple[jax.Array, jax.Array]:
    require_hopper()
    from gemma_kernels.decode_attention.hopper import decode_attention_hopper

    return decode_attention_hopper(*operands, **options)


SCALES = ("k_scale_BKS", "v_scale_BKS")
IMPLEMENTATIONS: dict[str, Callable] = {
    "tpu": _tpu,
    "hopper": _hopper,
    "xla": _of_layer(decode_attention_xla),
    "reference": _of_layer(decode_attention_reference),
}
# Tried in this order. "hopper" is not among them as long as it has not run on a Hopper GPU.
AUTOMATIC = ("tpu", "xla")


def decode_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    layer: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention of 1 to 16 new tokens over a key/value cache, which holds theirs already.

    Only `"xla"` and `"reference"` have gradients: no decoding step needs one.

    Args:
      q_BTNH: Queries.
      k_BKSH, v_BKSH: Keys and values, in slots of any order; query head `n` reads head
        `n // (N / K)`. Floating-point numbers, or int8 with scales.
      lo_BT, hi_BT: int32; query `t` sees the keys with position in `[lo, hi)`.
      kv_pos_BS: int32 positions of the slots, -1 for those that no query may see.
      spec: Scale and soft cap; a promised window is of no use here.
      k_scale_BKS, v_scale_BKS: float32 factors of an int8 cache, one per token and head.
      layer: int32. Keys, values and scales are stacks `[L, B, ...]`, of which this layer is read
        where it lies.
      return_lse: Return the logarithm of the softmax's denominator as well.
      implementation: `None` or `"auto"` takes the first that can serve this call; a name from
        `IMPLEMENTATIONS` takes that one or fails.

    Returns:
      `[B, T, N, H]` in the dtype of the queries, zeros for a query that sees no key; with
      `return_lse` also float32 `[B, T, N]`, -inf for such a query.

    Raises:
      ValueError: Operands do not fit together, or the name is unknown.
      NotImplementedError: The named implementation, or every one, cannot serve this call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gemma_kernels.attention import AttentionSpec, causal_interval
      >>> from gemma_kernels.decode_attention import decode_attention
      >>> q_BTNH, kv_BKSH = jnp.ones((1, 1, 4, 16)), jnp.ones((1, 2, 128, 16))
      >>> kv_pos_BS = jnp.arange(128)[None]
      >>> lo_BT, hi_BT = causal_interval(jnp.array([[127]]), window=64)
      >>> mask = dict(lo_BT=lo_BT, hi_BT=hi_BT, kv_pos_BS=kv_pos_BS)
      >>> decode_attention(q_BTNH, kv_BKSH, kv_BKSH, **mask, spec=AttentionSpec(scale=0.25)).shape
      (1, 1, 4, 16)
    """
    operands = (q_BTNH, k_BKSH, v_BKSH, lo_BT, hi_BT, kv_pos_BS, spec)
    check_operands(*operands, k_scale_BKS, v_scale_BKS, stacked=layer is not None)
    options = dict(
        k_scale_BKS=k_scale_BKS, v_scale_BKS=v_scale_BKS, layer=layer, return_lse=return_lse
    )
    return first_that_can(
        "decode attention", IMPLEMENTATIONS, AUTOMATIC, implementation, *operands, **options
    )
