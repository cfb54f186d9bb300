"""From an image to the soft tokens that stand for it in a prompt: tower, pooling, projection.

Local letters: I images; Q patches of an image; C width of the tower.
"""

import jax
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import VisionConfig
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.encoders import encoder_of
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.runtime import Runtime
from gemma_jax.vision.siglip import Tower, TowerContext

_PREFIX = "vision."


class Projector(nnx.Module):
    """Averages squares of patches, normalises, and maps to the decoder's width.

    The result is not scaled by sqrt(D) as token embeddings are (hf `Gemma3MultiModalProjector`).
    """

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        vision = cfg.vision
        self.pooled = vision.pooled
        self.norm = RMSNorm(cfg, "C", size=vision.d_tower, eps=vision.norm_eps)
        self.proj = Einsum("ITC,DC->ITD", {**cfg.sizes, **vision.sizes}, rngs=rngs)

    def __call__(self, x_IQC: jax.Array, runtime: Runtime) -> jax.Array:
        I, Q, C = x_IQC.shape
        side = self.pooled
        stride = int(Q**0.5) // side
        x_ITC = x_IQC.reshape(I, side, stride, side, stride, C).mean((2, 4)).reshape(I, -1, C)
        return self.proj(self.norm(x_ITC, runtime.numerics))


class VisionEncoder(nnx.Module):
    """Tower and projector: `pixels [I, 3, size, size]` to soft tokens `[I, T, D]`.

    Attributes:
      captures: What may be captured: `vision.layer_outputs [L, I, Q, C]`, after each layer of the
        tower, and `vision.tower [I, Q, C]`, after its last norm.
    """

    captures = ("vision.layer_outputs", "vision.tower")

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs, layout: Layout):
        self.image_size = cfg.vision.image_size
        self.tower = Tower(cfg.vision, rngs=rngs, layout=layout)
        self.projector = Projector(cfg, rngs=rngs)

    def __call__(
        self, pixels: jax.Array, runtime: Runtime, capture: frozenset[str] = frozenset()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Soft tokens in the tower's dtype, and what `capture` names.

        Raises:
          ValueError: The images have another size than the tower takes.
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"pixels must be [I, {sizes}], got {list(pixels.shape)}")
        inside = frozenset(name.removeprefix(_PREFIX) for name in capture)
        ctx = TowerContext(runtime=runtime, capture=inside)
        with jax.named_scope("vision"):
            x_IQC, captured = self.tower(pixels.astype(runtime.vision_dtype or runtime.dtype), ctx)
            soft_ITD = self.projector(x_IQC, runtime)
        captured["tower"] = x_IQC
        return soft_ITD, {name: captured[name.removeprefix(_PREFIX)] for name in capture}


@encoder_of.register
def siglip_encoder(
    vision: VisionConfig, cfg: GemmaConfig, *, rngs: nnx.Rngs, layout: Layout
) -> VisionEncoder:
    """The encoder of `cfg.vision`."""
    return VisionEncoder(cfg, rngs=rngs, layout=layout)
