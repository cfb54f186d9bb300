"""Where soft tokens go in a text, and who sees whom there."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gemma_jax.config import VisionConfig
from gemma_jax.vision.encoder import encode_images


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SoftTokens:
    """Embeddings that take the place of some of the new tokens of one pass.

    Attributes:
      embeddings_ITD: Soft tokens of all images in the pass, whatever row they are in.
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


def soft_tokens(model, tokens_BT: jax.Array, pixels: jax.Array) -> SoftTokens:
    """Images for the placeholders in `tokens_BT`, in order, row by row; differentiable.

    Args:
      model: A `Gemma` with a vision tower.
      tokens_BT: int32 ids; every image has its run of `num_soft_tokens` placeholders.
      pixels: float `[I, 3, size, size]` in [-1, 1].
    """
    embeddings_ITD, _ = encode_images(model, pixels)
    index_BT, block_BT = locate(tokens_BT, model.cfg.vision)
    return SoftTokens(embeddings_ITD=embeddings_ITD, index_BT=index_BT, block_BT=block_BT)


def locate(tokens_BT: jax.Array, cfg: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """`index_BT` and `block_BT` of `SoftTokens`, from the placeholders; one block per image."""
    is_soft_BT = jnp.asarray(tokens_BT) == cfg.image_token
    count_BT = jnp.cumsum(is_soft_BT.ravel()).reshape(is_soft_BT.shape)
    index_BT = jnp.where(is_soft_BT, count_BT - 1, -1).astype(jnp.int32)
    block_BT = jnp.where(is_soft_BT, index_BT // cfg.num_soft_tokens + 1, 0)
    return index_BT, block_BT


def runs(is_image_BT: jax.Array) -> jax.Array:
    """int32 `[B, T]`: each run of True in a row is one block, numbered from 1; 0 elsewhere.

    How transformers finds the images in `token_type_ids` (hf `get_block_sequence_ids_for_mask`).
    """
    is_image_BT = jnp.asarray(is_image_BT)
    starts_BT = is_image_BT & ~jnp.pad(is_image_BT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(is_image_BT, jnp.cumsum(starts_BT, axis=1), 0).astype(jnp.int32)
