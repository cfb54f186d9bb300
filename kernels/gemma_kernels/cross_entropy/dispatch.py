"""One entry for every implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_kernels.cross_entropy.reference import statistics_reference
from gemma_kernels.cross_entropy.xla import statistics_xla
from gemma_kernels.quantized_matmul.form import QuantizedMatrix

IMPLEMENTATIONS: dict[str, Callable] = {"xla": statistics_xla, "reference": statistics_reference}


def cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array | QuantizedMatrix,
    labels_BT: jax.Array,
    *,
    weights_BT: jax.Array | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    return_lse: bool = False,
    return_best: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Computes `-log softmax(x @ table^T)[label]` per token, without all logits at one time.

    Products are in the dtype of `x`, everything after them in float32. Differentiable in `x`, the
    table and the weights, also through the log-sum-exp.

    Args:
      x_BTD: Activations in front of the head.
      table_VD: The head: one row per entry of the vocabulary, of floats or as a quantised matrix,
        which gets no gradient and is widened in chunks.
      labels_BT: int32. A label outside `[0, V)`, -1 by custom, is ignored: loss and gradients 0.
      weights_BT: Factors on the losses; tokens of weight 0 are ignored.
      soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)`; `None` leaves them.
      z_loss: Factor on the squared log-sum-exp that is added, to keep it near 0 (PaLM, section 5).
      chunk: Rows of the table whose logits exist at one time; `None` chooses.
      return_lse: Return the log-sum-exp of the logits as well.
      return_best: Return as well whether no logit is larger than that of the label; bool, `False`
        where the label is ignored.
      implementation: A name from `IMPLEMENTATIONS`; `None` is `"xla"`.

    Returns:
      float32 `[B, T]` of losses in nats, or a tuple of them and what else is asked for. Not
      reduced: a mean over tokens is `losses.sum() / weights.sum()`.

    Raises:
      ValueError: Operands do not fit together, or the name is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gemma_kernels.cross_entropy import cross_entropy
      >>> x_BTD, table_VD = jnp.zeros((1, 2, 8)), jnp.ones((1000, 8))
      >>> cross_entropy(x_BTD, table_VD, jnp.array([[3, -1]])).round(2)  # -1: ignored
      Array([[6.91, 0.  ]], dtype=float32)
    """
    _check(x_BTD, table_VD, labels_BT, weights_BT, soft_cap, chunk)
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown cross-entropy {implementation=}; choose one of: {known}")
    with jax.named_scope("cross_entropy"):
        statistics = IMPLEMENTATIONS[name](x_BTD, table_VD, labels_BT, soft_cap, chunk)
        lse_BT, chosen_BT, top_BT = statistics
        losses_BT = lse_BT - chosen_BT
        if z_loss:
            losses_BT += z_loss * jnp.square(lse_BT)
        counts_BT = (labels_BT >= 0) & (labels_BT < table_VD.shape[0])
        if weights_BT is not None:
            counts_BT &= weights_BT != 0
            losses_BT *= weights_BT.astype(jnp.float32)
        losses_BT = jnp.where(counts_BT, losses_BT, 0.0)
    more = [lse_BT] if return_lse else []
    if return_best:
        more.append(counts_BT & (chosen_BT >= top_BT))
    return (losses_BT, *more) if more else losses_BT


def _check(x_BTD, table_VD, labels_BT, weights_BT, soft_cap, chunk) -> None:
    if x_BTD.ndim != 3 or len(table_VD.shape) != 2 or x_BTD.shape[2] != table_VD.shape[1]:
        raise ValueError(
            f"x must be [B, T, D] and the table [V, D] with one D, got {x_BTD.shape} and "
            f"{table_VD.shape}"
        )
    if not jnp.issubdtype(labels_BT.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels_BT.dtype}")
    for name, array in (("labels", labels_BT), ("weights", weights_BT)):
        if array is not None and array.shape != x_BTD.shape[:2]:
            raise ValueError(
                f"{name} of shape {array.shape} do not fit activations of shape {x_BTD.shape}; "
                f"give {x_BTD.shape[:2]}"
            )
    if not (isinstance(table_VD, QuantizedMatrix) or jnp.issubdtype(table_VD.dtype, jnp.floating)):
        raise ValueError(
            f"a table holds floats, got {table_VD.dtype}; whole numbers with scales are a "
            "QuantizedMatrix"
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} must be positive, or None for no cap")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1, or None to choose")
