"""One entry for every implementation."""

from collections.abc import Callable

import jax

from gemma_kernels.attention.reference import attention_reference
from gemma_kernels.attention.spec import AttentionSpec, check_shapes
from gemma_kernels.attention.xla import attention_xla
from gemma_kernels.platform import target_platform

FEW = 16  # new tokens of a decoding step, at most


def _tpu(*operands) -> jax.Array:
    if (platform := target_platform()) != "tpu":
        raise NotImplementedError(f"needs a TPU; this program is for {platform}")
    from gemma_kernels.attention.tpu import attention_tpu  # Pallas takes a while to import

    return attention_tpu(*operands)


IMPLEMENTATIONS: dict[str, Callable] = {
    "tpu": _tpu,
    "xla": attention_xla,
    "reference": attention_reference,
}


def automatic(T: int) -> tuple[str, ...]:
    """Names to be tried for `T` new tokens, in this order."""
    return ("xla",) if T <= FEW else ("tpu", "xla")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention under an interval mask.

    Args:
      q_BTNH: Queries.
      k_BSKH, v_BSKH: Keys and values; query head `n` reads head `n // (N / K)`.
      lo_BT, hi_BT: int32; query `t` sees the keys with position in `[lo, hi)`.
      kv_pos_BS: int32 positions of the keys, -1 for slots that no query may see.
      spec: Scale, soft cap and promises about the mask.
      implementation: `None` takes the first that can serve this call; a name from
        `IMPLEMENTATIONS` takes that one or fails.

    Returns:
      `[B, T, N, H]` in the dtype of the queries; zeros for a query that sees no key.

    Raises:
      ValueError: Operands do not fit together, or the name is unknown.
      NotImplementedError: The named implementation, or every one, cannot serve this call.
    """
    operands = (q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS)
    check_shapes(*operands)
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"unknown attention {implementation=}; choose one of: {known}")
        return IMPLEMENTATIONS[implementation](*operands, spec)
    reasons = []
    for name in automatic(q_BTNH.shape[1]):
        try:
            return IMPLEMENTATIONS[name](*operands, spec)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no attention implementation fits: " + "; ".join(reasons))
