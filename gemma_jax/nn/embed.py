"""Token embedding, which is the output head as well."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.nn.einsum import contract


class Embedder(nnx.Module):
    """One table `[V, D]` in two roles (tied head)."""

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        self.vocab_size = cfg.vocab_size
        shape = (cfg.vocab_size, cfg.d_model)
        self.table = nnx.Param(rngs.normal(shape) * cfg.d_model**-0.5, dims="VD", inputs="D")

    def encode(self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of the table times sqrt(D), `[B, T, D]` in `dtype`.

        The scalar is rounded to `dtype` first (hf `Gemma3TextScaledWordEmbedding`): in bfloat16
        sqrt(640) is 25.25. Text only: soft tokens of images and audio are not scaled. Ids beyond
        the table, as their placeholders may be, read row 0 (hf `Gemma3Model.forward`).
        """
        table = self.table.get_value()
        x_BTD = table[jnp.where(tokens_BT < self.vocab_size, tokens_BT, 0)].astype(dtype)
        return x_BTD * jnp.asarray(math.sqrt(x_BTD.shape[-1]), dtype)

    def decode(self, x_BTD: jax.Array) -> jax.Array:
        """Logits `[B, T, V]`, with the unscaled table."""
        return contract("BTD,VD->BTV", x_BTD, self.table.get_value())
