"""Static facts of one attention call."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What is known about an attention call at trace time.

    Attributes:
      scale: Factor on the scores.
      soft_cap: Scores become `soft_cap * tanh(scores / soft_cap)`; `None` leaves them.
      window: A promise, not a mask. With it the caller states that keys lie in query order,
        aligned at the end (query row `i` belongs to key row `i + S - T`), and that no query sees
        a key after its own row or more than `window - 1` rows before it; implementations may then
        skip the rest. `None` promises nothing.
      masked: `False` promises that every query sees every key, as in a vision tower.
      softmax_in_float32: Whether scores are widened to float32 before the softmax, or rounded to
        the dtype of the queries.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    masked: bool = True
    softmax_in_float32: bool = True

    def __post_init__(self):
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be positive, or None for no cap")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None")


def check_shapes(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS) -> None:
    """Raises `ValueError` unless the operands of `attention` fit together."""
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    expected = {
        "k_BSKH": (k_BSKH, (B, S, K, H)),
        "v_BSKH": (v_BSKH, (B, S, K, H)),
        "lo_BT": (lo_BT, (B, T)),
        "hi_BT": (hi_BT, (B, T)),
        "kv_pos_BS": (kv_pos_BS, (B, S)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}; with q {q_BTNH.shape} it needs {shape}"
            )
    if N % K:
        raise ValueError(f"query heads N={N} must be a multiple of key/value heads K={K}")
