"""The definition of cross-entropy here: dense, float32, no tricks."""

import jax
import jax.numpy as jnp
from jax.lax import Precision

from gemma_kernels.quantized_matmul.form import QuantizedMatrix


def statistics_reference(
    x_BTD: jax.Array,
    table_VD: jax.Array | QuantizedMatrix,
    labels_BT: jax.Array,
    soft_cap: float | None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the logits `x @ table^T`, capped: log-sum-exp, that of the label, and the largest.

    Returns:
      float32 `[B, T]` thrice; the second is 0 for a label that is no row of the table.
    """
    if isinstance(table_VD, QuantizedMatrix):
        table_VD = table_VD.dense()
    wide_VD = table_VD.astype(jnp.float32)
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", x_BTD.astype(jnp.float32), wide_VD, precision=Precision.HIGHEST
    )
    if soft_cap is not None:
        logits_BTV = soft_cap * jnp.tanh(logits_BTV / soft_cap)
    is_label_BTV = labels_BT[:, :, None] == jnp.arange(len(table_VD))
    chosen_BT = jnp.sum(jnp.where(is_label_BTV, logits_BTV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1), chosen_BT, jnp.max(logits_BTV, axis=-1)
