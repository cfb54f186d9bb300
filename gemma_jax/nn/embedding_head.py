"""One vector of a text: the mean of its tokens, dense layers, length one.

    pooled = mean(final_norm(x) over the real tokens, BOS, EOS and prompt among them)
    dense  = W_n ... W_1 pooled                 no bias, no activation
    result = dense / |dense|, or its first numbers over their own norm (Matryoshka)

All of it is float32, whatever the decoder computes in: a sum over a thousand tokens is no place for
eight bits, and the work is less than that of one token.
Source: `Pooling`, `Dense` and `Normalize` of sentence-transformers 6.2.

Local letters: I inputs of a dense layer; O outputs of it.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.nn.einsum import Einsum
from gemma_jax.text_embedding_config import TextEmbeddingConfig

SMALLEST = 1e-12  # below such a norm a vector is not stretched (`torch.nn.functional.normalize`)


class EmbeddingHead(nnx.Module):
    """Makes one vector of each text out of the decoder's last states.

    Args:
      head: What it consists of.
      d_model: Width D of the decoder.
    """

    def __init__(self, head: TextEmbeddingConfig, d_model: int, *, rngs: nnx.Rngs):
        widths = (d_model, *head.dense)
        self.normalise = head.normalise
        self.dense = nnx.List(
            [
                Einsum("BI,OI->BO", {"I": inputs, "O": outputs}, rngs=rngs)
                for inputs, outputs in pairwise(widths)
            ]
        )

    def pool(self, x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Mean over the real tokens, float32 `[B, D]`; 0 for a row without any."""
        real_BT1 = real_BT[..., None]
        # Padding is left out before the sum: whatever it holds must not be multiplied by 0.
        total_BD = jnp.sum(jnp.where(real_BT1, x_BTD.astype(jnp.float32), 0.0), axis=1)
        return total_BD / jnp.maximum(jnp.sum(real_BT1, axis=1), 1)

    def project(self, pooled_BD: jax.Array) -> jax.Array:
        """The dense layers, one after the other, float32 `[B, width of the last one]`."""
        y_BO = pooled_BD
        for layer in self.dense:
            y_BO = layer(y_BO)
        return y_BO

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array, dimensions: int | None = None
    ) -> jax.Array:
        """Embeddings, float32 `[B, width]`, or `[B, dimensions]`.

        Args:
          x_BTD: States behind the final norm.
          real_BT: bool, which tokens are no padding.
          dimensions: How many numbers to keep, the first ones; they get a norm of their own.
        """
        y_BO = self.project(self.pool(x_BTD, real_BT))[:, :dimensions]
        if not self.normalise:
            return y_BO
        norm_B1 = jnp.linalg.norm(y_BO, axis=1, keepdims=True)
        return y_BO / jnp.maximum(norm_B1, SMALLEST)
