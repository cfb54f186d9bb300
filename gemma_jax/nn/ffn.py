"""Gated feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.stats import norm

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.nn.einsum import Einsum


class FeedForward(nnx.Module):
    """`down(gelu(gate x) * up x)` with the tanh approximation of GELU.

    In a sparse layer the gate keeps what exceeds a threshold, and less that (hf `_gaussian_topk`).
    """

    def __init__(self, cfg: GemmaConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        sizes = {**cfg.sizes, "F": spec.d_ff}
        self.sparsity = spec.sparsity
        self.gate = Einsum("BTD,FD->BTF", sizes, rngs=rngs)
        self.up = Einsum("BTD,FD->BTF", sizes, rngs=rngs)
        self.down = Einsum("BTF,DF->BTD", sizes, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, width: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`[B, T, D]`, and captured intermediates.

        Args:
          width: Scalar; computes as if there were only so many first channels.
        """
        gate_BTF, taps = self.gate(x_BTD), {}
        keep_F = None if width is None else jnp.arange(gate_BTF.shape[-1]) < width
        if self.sparsity:
            gate_BTF = gaussian_top(gate_BTF, self.sparsity, keep_F)
            taps["sparsity_masks"] = gate_BTF > 0
        hidden_BTF = jax.nn.gelu(gate_BTF, approximate=True) * self.up(x_BTD)
        if keep_F is not None:
            hidden_BTF = jnp.where(keep_F, hidden_BTF, 0)
        return self.down(hidden_BTF), taps


def gaussian_top(x: jax.Array, sparsity: float, keep: jax.Array | None = None) -> jax.Array:
    """`relu(x - threshold)`: about `1 - sparsity` of the last axis would pass if it were normal.

    The threshold is `mean + std * icdf(sparsity)`, with the population's standard deviation: that
    of the entries in `keep`, by default of all.
    """
    deviations = norm.ppf(jnp.float32(sparsity)).astype(x.dtype)
    mean = jnp.mean(x, axis=-1, keepdims=True, where=keep)
    std = jnp.std(x, axis=-1, keepdims=True, where=keep)
    return jax.nn.relu(x - (mean + std * deviations))
