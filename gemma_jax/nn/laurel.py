"""Learned augmented residual: a low-rank map beside attention.

Local letters: R low rank.
"""

import jax
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.numerics import Numerics


class Laurel(nnx.Module):
    """`x + norm(right(left x))` (Menghani et al., "LAuReL", 2024; hf `Gemma3nTextLaurelBlock`)."""

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        self.left = Einsum("BTD,RD->BTR", cfg.sizes, rngs=rngs)
        self.right = Einsum("BTR,DR->BTD", cfg.sizes, rngs=rngs)
        self.norm = RMSNorm(cfg, "D")

    def __call__(self, x_BTD: jax.Array, numerics: Numerics) -> jax.Array:
        return x_BTD + self.norm(self.right(self.left(x_BTD)), numerics)
