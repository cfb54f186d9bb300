"""Token embedding, and the output head; embeddings of ids for other modalities.

Local letters: I items that soft tokens come in; C width of the other modality's vectors.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.config import GemmaConfig, ModalityVocabulary
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.norm import RMSNorm, rms_norm
from gemma_jax.numerics import Numerics
from gemma_jax.weights.contract import contract
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import head_rows
from gemma_kernels.cross_entropy import cross_entropy


class Embedder(nnx.Module):
    """One table `[V, D]` in two roles, unless the config unties the head: then it has its own."""

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        self.vocab_size = cfg.vocab_size
        shape = (cfg.vocab_size, cfg.d_model)

        def table() -> nnx.Param:
            return nnx.Param(rngs.normal(shape) * cfg.d_model**-0.5, dims="VD", inputs="D")

        self.table = table()
        self.head = None if cfg.tied_head else table()

    @property
    def output(self) -> nnx.Param:
        """The table that logits are computed with."""
        return self.table if self.head is None else self.head

    def encode(self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of the table times sqrt(D), `[B, T, D]` in `dtype`.

        The scalar is rounded to `dtype` first (hf `Gemma3TextScaledWordEmbedding`): in bfloat16
        sqrt(640) is 25.25. Text only: soft tokens are not scaled. Ids beyond the table, as their
        placeholders may be, read row 0 (hf `Gemma3Model.forward`).
        """
        table = self.table.get_value()
        inside_BT = jnp.where(tokens_BT < self.vocab_size, tokens_BT, 0)
        x_BTD = lookup(table, inside_BT).astype(dtype)
        return x_BTD * jnp.asarray(math.sqrt(x_BTD.shape[-1]), dtype)

    def decode(self, x_BTD: jax.Array) -> jax.Array:
        """Logits `[B, T, V]`, with the unscaled table or the head."""
        return contract("BTD,VD->BTV", x_BTD, self.output.get_value())

    def cross_entropy(self, x_BTD: jax.Array, labels_BT: jax.Array, **options) -> jax.Array:
        """Losses of the labels, with the logits in chunks; see `gemma_kernels.cross_entropy`."""
        table = head_rows(self.output.get_value())
        losses_BT = cross_entropy(x_BTD, table, labels_BT, **options)
        return losses_BT  # pyright: ignore[reportReturnType]


class ModalityEmbedder(nnx.Module):
    """Vectors in a tower's width, mapped to the decoder's (hf `Gemma3nMultimodalEmbedder`).

    They are rows of its table (hard), for ids of its vocabulary, or come from the tower (soft):
    `norm(proj(norm(vector) * scale))`, each kind with a scale of its own, the outer norm without
    one; not multiplied by sqrt(D).
    """

    def __init__(self, cfg: GemmaConfig, vocabulary: ModalityVocabulary, *, rngs: nnx.Rngs):
        self.vocabulary = vocabulary
        V, C = vocabulary.vocab_size, vocabulary.width
        self.table = nnx.Param(rngs.normal((V, C)), dims="VC", inputs="C")
        self.norm = RMSNorm(cfg, "C", size=C, eps=vocabulary.norm_eps)
        self.soft_norm = RMSNorm(cfg, "C", size=C, eps=vocabulary.norm_eps)
        self.proj = Einsum("BTC,DC->BTD", {"C": C, "D": cfg.d_model}, rngs=rngs)

    def soft(self, x_ITC: jax.Array, numerics: Numerics) -> jax.Array:
        """Soft tokens `[I, T, D]` of what the tower makes of items."""
        return self._project(self.soft_norm(x_ITC, numerics), numerics)

    def hard(self, rows_BT: jax.Array, dtype: jax.typing.DTypeLike, numerics: Numerics):
        """Embeddings `[B, T, D]` of rows of the table."""
        rows_BTC = lookup(self.table.get_value(), rows_BT).astype(dtype)
        return self._project(self.norm(rows_BTC, numerics), numerics)

    def insert(self, tokens_BT: jax.Array, x_BTD: jax.Array, numerics: Numerics) -> jax.Array:
        """`x_BTD`, with these embeddings where the ids are of this vocabulary."""
        rows_BT = tokens_BT - self.vocabulary.first_id
        ours_BT = (rows_BT >= 0) & (rows_BT < self.vocabulary.vocab_size)
        y_BTD = self.hard(jnp.where(ours_BT, rows_BT, 0), x_BTD.dtype, numerics)
        return jnp.where(ours_BT[:, :, None], y_BTD, x_BTD)

    def _project(self, x_BTC: jax.Array, numerics: Numerics) -> jax.Array:
        return rms_norm(self.proj(x_BTC), self.vocabulary.norm_eps, numerics)
