"""Gated feed-forward network."""

import jax
from flax import nnx

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.nn.einsum import Einsum


class FeedForward(nnx.Module):
    """`down(gelu(gate x) * up x)` with the tanh approximation of GELU."""

    def __init__(self, cfg: GemmaConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        sizes = {**cfg.sizes, "F": spec.d_ff}
        self.gate = Einsum("BTD,FD->BTF", sizes, rngs=rngs)
        self.up = Einsum("BTD,FD->BTF", sizes, rngs=rngs)
        self.down = Einsum("BTF,DF->BTD", sizes, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.gelu(self.gate(x_BTD), approximate=True) * self.up(x_BTD)
        return self.down(hidden_BTF)
