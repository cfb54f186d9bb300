"""How much the width of each layer matters."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch, token_array
from gemma_jax.decoder.losses import loss
from gemma_jax.decoder.model import Gemma

FRACTIONS = (0.75, 0.5, 0.25)


def sensitivity(
    model: Gemma, tokens_BT: np.ndarray, fractions: Sequence[float] = FRACTIONS
) -> np.ndarray:
    """Increase of the loss when one layer alone is narrowed, nats per token, `[L, fractions]`.

    Args:
      tokens_BT: Text to measure on; -1 for padding on the right.
      fractions: Of each layer's width, rounded up to whole channels.

    Raises:
      ValueError: A fraction outside (0, 1], or text without a next token.
    """
    measure = Measure(model, tokens_BT)
    full_L = np.array([spec.d_ff for spec in model.cfg.layers])
    whole = measure(full_L)
    return np.array([
        [measure(_narrowed(full_L, i, width_of(full_L[i], f))) - whole for f in fractions]
        for i in range(len(full_L))
    ])  # fmt: skip


class Measure:
    """Loss of a model on a text, as a function of its layers' widths: one compiled program."""

    def __init__(self, model: Gemma, tokens_BT: np.ndarray):
        tokens_BT = np.asarray(token_array(tokens_BT), np.int32)
        if tokens_BT.ndim != 2 or not (tokens_BT[:, 1:] >= 0).any():
            raise ValueError(
                f"tokens_BT of shape {list(tokens_BT.shape)} must be [B, T] with T of 2 or more; "
                "put a single text into a list: [ids]"
            )
        real_BT = tokens_BT >= 0
        positions_BT = np.where(real_BT, np.arange(tokens_BT.shape[1], dtype=np.int32), -1)
        self.model, self.tokens_BT = model, jnp.asarray(np.maximum(tokens_BT, 0))
        self.positions_BT = jnp.asarray(positions_BT)

    def __call__(self, widths_L: Sequence[int] | np.ndarray) -> float:
        widths = jnp.asarray(widths_L, jnp.int32)
        batch = Batch(self.tokens_BT, self.positions_BT, ffn_widths_L=widths)
        return float(loss(self.model, batch))


def _narrowed(full_L: np.ndarray, layer: int, width: int) -> np.ndarray:
    return np.where(np.arange(len(full_L)) == layer, width, full_L)


def width_of(full: int, fraction: float) -> int:
    """That fraction of a width, in whole channels."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} of a width must lie in (0, 1]")
    return int(np.ceil(full * fraction))
