"""Embeddings that take the place of tokens.

Local letters: I items that soft tokens come in.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SoftTokens:
    """Embeddings that take the place of some of the new tokens of one pass.

    Attributes:
      embeddings_ITD: Soft tokens of all items in the pass, whatever row they are in.
      index_BT: int32; which of the `I * T` soft tokens stands at a place, -1 for a token of text.
      block_BT: int32; tokens with the same number above 0 see each other both ways. `None`: the
        mask stays causal.
    """

    embeddings_ITD: jax.Array
    index_BT: jax.Array
    block_BT: jax.Array | None

    def insert(self, x_BTD: jax.Array) -> jax.Array:
        """`x_BTD` with soft tokens in their places."""
        rows = self.embeddings_ITD.reshape(-1, x_BTD.shape[-1]).astype(x_BTD.dtype)
        soft_BTD = rows[jnp.maximum(self.index_BT, 0)]
        return jnp.where((self.index_BT >= 0)[:, :, None], soft_BTD, x_BTD)
