"""Per-layer embeddings: a short vector per token and layer, gated into the residual stream.

They are looked up, not multiplied, so that their table need not lie where the arithmetic is.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.nn.activations import ACTIVATIONS
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.nn.note import Note, unnoted
from gemma_jax.numerics import Numerics
from gemma_jax.weights.gather import lookup


class PerLayerEmbedder(nnx.Module):
    """Per-layer inputs of all layers, `[B, T, L, P]` (hf `project_per_layer_inputs`).

    Half of each comes from the table by the token's id, half is a projection of its embedding,
    with soft tokens already in their places.
    """

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        self.vocab_size = cfg.per_layer.vocab_size
        shape = (self.vocab_size, len(cfg.layers), cfg.per_layer.width)
        scale = cfg.per_layer.width**-0.5
        self.table = nnx.Param(rngs.normal(shape) * scale, dims="VLP", inputs="P")
        self.proj = Einsum("BTD,LPD->BTLP", cfg.sizes, rngs=rngs)
        self.norm = RMSNorm(cfg, "P")

    def __call__(self, tokens_BT: jax.Array, x_BTD: jax.Array, numerics: Numerics) -> jax.Array:
        dtype = x_BTD.dtype
        projected_BTLP = self.proj(x_BTD) * jnp.asarray(x_BTD.shape[-1] ** -0.5, dtype)
        total_BTLP = self.norm(projected_BTLP, numerics) + self.lookup(tokens_BT, dtype)
        return total_BTLP * jnp.asarray(2**-0.5, dtype)

    def lookup(self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of the table times sqrt(P); ids outside it read row 0."""
        inside_BT = (tokens_BT >= 0) & (tokens_BT < self.vocab_size)
        rows_BTLP = lookup(self.table.get_value(), jnp.where(inside_BT, tokens_BT, 0)).astype(dtype)
        return rows_BTLP * jnp.asarray(math.sqrt(rows_BTLP.shape[-1]), dtype)


class PerLayerInput(nnx.Module):
    """One layer's use of its vector: `norm(proj(activation(gate x) * vector))`."""

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        self.activation = cfg.activation
        self.gate = Einsum("BTD,PD->BTP", cfg.sizes, rngs=rngs)
        self.proj = Einsum("BTP,DP->BTD", cfg.sizes, rngs=rngs)
        self.norm = RMSNorm(cfg, "D")

    def __call__(
        self,
        x_BTD: jax.Array,
        vector_BTP: jax.Array,
        numerics: Numerics,
        note: Note = unnoted,
    ) -> jax.Array:
        """`[B, T, D]` to add to the stream."""
        gate_BTP = note("per_layer_gates", ACTIVATIONS[self.activation](self.gate(x_BTD)))
        return self.norm(self.proj(gate_BTP * vector_BTP), numerics)
