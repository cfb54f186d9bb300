"""One entry for every implementation."""

from collections.abc import Callable

import jax

from gemma_kernels.attention.cudnn import attention_cudnn
from gemma_kernels.attention.mask import Mask, causal_rows, everything
from gemma_kernels.attention.reference import attention_reference
from gemma_kernels.attention.spec import AttentionSpec, check_operands
from gemma_kernels.attention.xla import attention_xla
from gemma_kernels.implementations import first_that_can
from gemma_kernels.platform import require, require_hopper


def _tpu(*operands, **options) -> jax.Array | tuple[jax.Array, jax.Array]:
    require("tpu")
    from gemma_kernels.attention.tpu.attention import (
        attention_tpu,  # Pallas takes a while to import
    )

    return attention_tpu(*operands, **options)


def _hopper(*operands, **options) -> jax.Array | tuple[jax.Array, jax.Array]:
    require_hopper()
    from gemma_kernels.attention.hopper.attention import attention_hopper  # as above

    return attention_hopper(*operands, **options)


def _with_mask(implementation: Callable) -> Callable:
    """`implementation`, for which a mask that the spec states is written out as intervals."""

    def attention(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, **options):
        if lo_BT is None:
            B, T, S = *q_BTNH.shape[:2], k_BSKH.shape[1]
            mask = causal_rows(B, T, S, spec.window) if spec.causal else everything(B, T, S)
        else:
            mask = Mask(lo_BT, hi_BT, kv_pos_BS)
        return implementation(q_BTNH, k_BSKH, v_BSKH, *mask, spec, **options)

    return attention


IMPLEMENTATIONS: dict[str, Callable] = {
    "tpu": _tpu,
    "hopper": _hopper,
    "cudnn": attention_cudnn,
    "xla": _with_mask(attention_xla),
    "reference": _with_mask(attention_reference),
}
# Tried in this order. "hopper" is not among them as long as it has not run on a Hopper GPU.
AUTOMATIC = ("tpu", "cudnn", "xla")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    lo_BT: jax.Array | None = None,
    hi_BT: jax.Array | None = None,
    kv_pos_BS: jax.Array | None = None,
    spec: AttentionSpec,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes grouped-query attention under an interval mask (causal, window, padding, documents).

    Args:
      q_BTNH: Queries.
      k_BSKH, v_BSKH: Keys and values; query head `n` reads head `n // (N / K)`.
      lo_BT, hi_BT: int32; query `t` sees the keys with position in `[lo, hi)`. Left out, like
        the positions, where the spec states the whole mask (`causal=True`, `masked=False`).
      kv_pos_BS: int32 positions of the keys, -1 for slots that no query may see.
      spec: Scale, soft cap and promises about the mask.
      return_lse: Return the logarithm of the softmax's denominator as well.
      implementation: `None` or `"auto"` takes the first that can serve this call; a name from
        `IMPLEMENTATIONS` takes that one or fails.

    Returns:
      `[B, T, N, H]` in the dtype of the queries, zeros for a query that sees no key; with
      `return_lse` also float32 `[B, T, N]`, -inf for such a query. Both have gradients.

    Raises:
      ValueError: Operands do not fit together, or the name is unknown.
      NotImplementedError: The named implementation, or every one, cannot serve this call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gemma_kernels.attention import AttentionSpec, attention
      >>> q_BTNH, kv_BSKH = jnp.ones((1, 8, 4, 16)), jnp.ones((1, 8, 2, 16))
      >>> spec = AttentionSpec(scale=16**-0.5, causal=True, window=4)
      >>> attention(q_BTNH, kv_BSKH, kv_BSKH, spec=spec).shape
      (1, 8, 4, 16)
    """
    operands = (q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS)
    check_operands(*operands, spec)
    return first_that_can(
        "attention", IMPLEMENTATIONS, AUTOMATIC, implementation,
        *operands, spec, return_lse=return_lse,
    )  # fmt: skip
