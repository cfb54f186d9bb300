"""Static facts of one attention call."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """States what is known about an attention call when it is traced.

    Attributes:
      scale: Factor on the scores.
      soft_cap: Scores become `soft_cap * tanh(scores / soft_cap)`; `None` leaves them.
      window: A promise, not a mask. With it the caller states that keys lie in query order,
        aligned at the end (query row `i` belongs to key row `i + S - T`), and that no query sees
        a key after its own row or more than `window - 1` rows before it; implementations may then
        skip the rest. `None` promises nothing.
      causal: A statement of the whole mask, which then needs no operands: keys lie in query order,
        aligned at the end (query row `i` is key row `i + S - T`), and each query sees exactly the
        keys up to its own row, the last `window` of them if there is a window.
      masked: `False` promises that every query sees every key, as in a vision tower; a mask may
        then be left out, too.
      softmax_in_float32: Whether scores are widened to float32 before the softmax, or rounded to
        the dtype of the queries.

    Examples:
      >>> from gemma_kernels.attention import AttentionSpec
      >>> AttentionSpec(scale=256**-0.5, causal=True, window=512).soft_cap is None
      True
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    causal: bool = False
    masked: bool = True
    softmax_in_float32: bool = True

    def __post_init__(self):
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be positive, or None for no cap")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None")
        if not self.masked and (self.causal or self.window is not None):
            raise ValueError(
                f"masked=False means that every query sees every key; it contradicts "
                f"causal={self.causal}, window={self.window}"
            )


def check_operands(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lo_BT: jax.Array | None,
    hi_BT: jax.Array | None,
    kv_pos_BS: jax.Array | None,
    spec: AttentionSpec,
) -> None:
    """Raises `ValueError` unless the operands of `attention` fit together."""
    for name, array in {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKH": v_BSKH}.items():
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}; it needs four dimensions")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}; attention takes floating-point numbers")
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    expected = {"k_BSKH": (k_BSKH, (B, S, K, H)), "v_BSKH": (v_BSKH, (B, S, K, H))}
    mask = {"lo_BT": (lo_BT, (B, T)), "hi_BT": (hi_BT, (B, T)), "kv_pos_BS": (kv_pos_BS, (B, S))}
    given = {name: facts for name, facts in mask.items() if facts[0] is not None}
    if spec.causal and given:
        raise ValueError(f"causal=True states the whole mask; leave out {', '.join(given)}")
    if len(given) < len(mask) and (given or (spec.masked and not spec.causal)):
        absent = ", ".join(name for name in mask if name not in given)
        raise ValueError(f"a mask is missing {absent}; or state it by causal=True or masked=False")
    expected |= given
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}; with q {q_BTNH.shape} it needs {shape}"
            )
    if spec.causal and S < T:
        raise ValueError(f"a causal call needs a key for each query; got {T=} queries, {S=} keys")
    if N % K:
        raise ValueError(f"query heads N={N} must be a multiple of key/value heads K={K}")
