"""One number per layer, by which the stream is multiplied at the layer's end.

Local letters: E, of size 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerScale(nnx.Module):
    """`x * scale`, with a scale that is stored and never trained (hf `Gemma4TextDecoderLayer`).

    Its gradient is zero: in transformers it is a buffer, not a parameter.
    """

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(1), dims="E")

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.stop_gradient(self.scale[...]).astype(x.dtype)
