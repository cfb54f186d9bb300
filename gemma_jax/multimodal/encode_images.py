"""Pixels of images become soft tokens."""

from functools import partial

import jax
import jax.numpy as jnp

from gemma_jax.decoder.model import Gemma
from gemma_jax.vision.encoder import CAPTURES


@partial(jax.jit, static_argnames=("capture",))
def encode_images(
    model: Gemma, pixels: jax.Array, *, capture: tuple[str, ...] = ()
) -> tuple[jax.Array, dict[str, jax.Array | tuple[jax.Array, ...]]]:
    """Soft tokens of images, and intermediate results.

    Args:
      model: With a vision tower.
      pixels: float `[I, 3, size, size]` in [-1, 1], as `preprocess` makes them.
      capture: Names out of `CAPTURES`: `vision.layer_outputs [L, I, Q, C]` (after each layer of the
        tower), `vision.tower [I, Q, C]` (after its last norm), `vision.soft_tokens [I, T, D]`.

    Raises:
      ValueError: The model has no tower, or the images have another size than it takes.
    """
    if (cfg := model.cfg.vision) is None:
        raise ValueError("this model reads text alone; images need one with a vision tower")
    expected = (3, cfg.image_size, cfg.image_size)
    if pixels.ndim != 4 or pixels.shape[1:] != expected:
        raise ValueError(f"pixels must be [I, {', '.join(map(str, expected))}], got {pixels.shape}")
    if unknown := set(capture) - set(CAPTURES):
        raise ValueError(f"cannot capture {sorted(unknown)}; choose from {', '.join(CAPTURES)}")
    return model.vision(jnp.asarray(pixels), model.runtime, frozenset(capture))
