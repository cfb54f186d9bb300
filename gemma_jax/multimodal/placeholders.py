"""Where soft tokens go in a text, and who sees whom there.

Local letters: I items that soft tokens come in.
"""

import jax
import jax.numpy as jnp

from gemma_jax.config import VisionConfig
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.multimodal.encode import encode_images


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
