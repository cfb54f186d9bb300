"""Gated feed-forward network."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.stats import norm

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.nn.activations import ACTIVATIONS
from gemma_jax.nn.einsum import Einsum
from gemma_jax.remat import keep


class FeedForward(nnx.Module):
    """`down(activation(gate x) * up x)`; Gemma's activation is GELU by its tanh approximation.

    In a sparse layer the gate keeps what exceeds a threshold, and less that (hf `_gaussian_topk`).
    """

    def __init__(self, cfg: GemmaConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        sizes = cfg.layer_sizes(spec)
        self.activation = cfg.activation
        self.gate = Einsum("BTD,FD->BTF", sizes, rngs=rngs)
        self.up = Einsum("BTD,FD->BTF", sizes, rngs=rngs)
        self.down = Einsum("BTF,DF->BTD", sizes, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        width: jax.Array | None = None,
        deviations: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`[B, T, D]`, and captured intermediates.

        Args:
          width: Scalar; computes as if there were only so many first channels.
          deviations: Scalar, for a layer that keeps the top of the gate alone: see `gaussian_top`.
        """
        gate_BTF, captured = keep("ffn_gate", self.gate(x_BTD)), {}
        keep_F = None if width is None else jnp.arange(gate_BTF.shape[-1]) < width
        if deviations is not None:
            gate_BTF = gaussian_top(gate_BTF, deviations, keep_F)
            captured["sparsity_masks"] = gate_BTF > 0
        hidden_BTF = ACTIVATIONS[self.activation](gate_BTF) * keep("ffn_up", self.up(x_BTD))
        if keep_F is not None:
            hidden_BTF = jnp.where(keep_F, hidden_BTF, 0)
        return keep("ffn_down", self.down(hidden_BTF)), captured


def deviations_below(shares: Sequence[float]) -> tuple[jax.Array, ...]:
    """How many standard deviations above its mean a normal distribution reaches each share."""
    return tuple(norm.ppf(jnp.array(shares, jnp.float32)))


def gaussian_top(x: jax.Array, deviations: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """`relu(x - (mean + std * deviations))`: the top of the last axis.

    The standard deviation is the population's: that of the entries in `keep`, by default of all.
    At `deviations_below([share])` about `1 - share` of them would pass if they were normal.
    """
    mean = jnp.mean(x, axis=-1, keepdims=True, where=keep)
    std = jnp.std(x, axis=-1, keepdims=True, where=keep)
    return jax.nn.relu(x - (mean + std * deviations.astype(x.dtype)))
