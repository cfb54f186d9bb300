"""MobileNetV5: an image to the features of its squares, in the tower's width.

x = gelu(norm(conv(pixels)))              half the side
for each stage:  for each block:  x = block(x)
features = fusion(results of the last two stages)

(timm `models/mobilenetv5.py`, `MobileNetV5Encoder`). `nn/embed.py` maps them to the decoder's
width, as it maps the vocabularies of images and sounds.

Local letters: I images; Y rows of a map; X columns of a map; C channels; U colour channels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import MobileNetConfig
from gemma_jax.nn.encoders import encoder_of
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.remat import NONE
from gemma_jax.runtime import Runtime
from gemma_jax.vision.mobilenet_blocks import (
    ChannelNorm,
    Conv,
    PointwisePair,
    gelu,
    make_block,
)
from gemma_jax.weights.contract import HIGHEST


class Stem(nnx.Module):
    """The first convolution: `gelu(norm(conv(pixels)))`."""

    def __init__(self, cfg: MobileNetConfig, *, rngs: nnx.Rngs):
        self.conv = Conv(3, cfg.d_stem, 3, stride=2, bias=True, rngs=rngs)
        self.norm = ChannelNorm("E", cfg.d_stem, cfg.norm_eps)

    def __call__(self, pixels_IYXU: jax.Array) -> jax.Array:
        return gelu(self.norm(self.conv(pixels_IYXU)))


class Fusion(PointwisePair):
    """Two maps of different sizes become one of `side` x `side` (timm's fusion adapter).

    The coarse one is repeated to the size of the fine one. What comes out is averaged where its
    side is a multiple of `side`, and interpolated where not.
    """

    def __init__(self, cfg: MobileNetConfig, *, rngs: nnx.Rngs):
        channels = sum(stage[-1].channels for stage in cfg.stages[-2:])
        inner = cfg.fusion_inner(channels)
        super().__init__({"C": channels, "M": inner, "E": cfg.d_tower}, cfg.norm_eps, rngs=rngs)
        self.side = cfg.pooled
        self.norm = ChannelNorm("E", cfg.d_tower, cfg.norm_eps)

    def __call__(self, fine_IYXC: jax.Array, coarse_IYXC: jax.Array) -> jax.Array:
        factor = fine_IYXC.shape[1] // coarse_IYXC.shape[1]
        coarse_IYXC = jnp.repeat(jnp.repeat(coarse_IYXC, factor, axis=1), factor, axis=2)
        x_IYXC = super().__call__(jnp.concatenate([fine_IYXC, coarse_IYXC], axis=-1))
        return self.norm(_resize(x_IYXC, self.side))


def _resize(x_IYXC: jax.Array, side: int) -> jax.Array:
    """The map with another side."""
    I, Y, X, C = x_IYXC.shape
    if Y % side == 0 and X % side == 0:
        squares = x_IYXC.reshape(I, side, Y // side, side, X // side, C)
        return squares.mean(axis=(2, 4))
    shape = (I, side, side, C)
    return jax.image.resize(x_IYXC, shape, "bilinear", antialias=False, precision=HIGHEST)


class MobileNetEncoder(nnx.Module):
    """Reads images: `pixels [I, 3, size, size]` in [0, 1] to features `[I, T, C]`.

    The size need not be that of the config: the same network reads smaller and larger images, and
    gives as many features. It has to be a multiple of `cfg.stride`.

    Attributes:
      captures: What may be captured. All are maps as pixels are, `[I, channels, side, side]`:
        `vision.stem` after the first convolution, `vision.stages` a tuple with one map per stage,
        `vision.tower` the features as a map, before they are scaled.
    """

    captures = ("vision.stem", "vision.stages", "vision.tower")

    def __init__(self, cfg: MobileNetConfig, *, rngs: nnx.Rngs):
        self.stride = cfg.stride
        self.stem = Stem(cfg, rngs=rngs)
        stages, channels = [], cfg.d_stem
        for blocks in cfg.stages:
            stages.append(nnx.List())
            for block in blocks:
                stages[-1].append(make_block(block, channels, cfg.norm_eps, rngs=rngs))
                channels = block.channels
        self.stages = nnx.List(stages)
        self.fusion = Fusion(cfg, rngs=rngs)

    def __call__(
        self, pixels: jax.Array, runtime: Runtime, capture: frozenset[str] = frozenset()
    ) -> tuple[jax.Array, dict[str, jax.Array | tuple[jax.Array, ...]]]:
        """Features in reading order, times the square root of C; and what `capture` names.

        Args:
          pixels: float `[I, 3, size, size]`.
          runtime: The tower computes in its `vision_dtype`, or else its `dtype`.
          capture: Names out of `captures`.

        Raises:
          ValueError: Pixels of another shape.
        """
        self._check(pixels)
        run_block = _run_block
        if runtime.remat_policy != NONE:
            run_block = jax.checkpoint(_run_block, static_argnums=2)
        with jax.named_scope("vision"):
            pixels_IYXU = jnp.moveaxis(pixels.astype(runtime.vision_dtype or runtime.dtype), 1, -1)
            x_IYXC = stem_IYXC = self.stem(pixels_IYXU)
            maps = []
            for blocks in self.stages:
                for block in blocks:
                    x_IYXC = run_block(block, _place(x_IYXC, runtime), runtime)
                maps.append(x_IYXC)
            x_IYXC = self.fusion(*maps[-2:])
        features_ITC = x_IYXC.reshape(x_IYXC.shape[0], -1, x_IYXC.shape[-1])
        found = {"vision.stem": stem_IYXC, "vision.stages": tuple(maps), "vision.tower": x_IYXC}
        captured = {name: found[name] for name in capture}
        first = partial(jnp.moveaxis, source=-1, destination=1)  # channels, as in pixels
        return features_ITC * math.sqrt(x_IYXC.shape[-1]), jax.tree.map(first, captured)

    def _check(self, pixels: jax.Array) -> None:
        shape = pixels.shape
        if len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] and shape[2] > 0:
            if shape[2] % self.stride == 0:
                return
        raise ValueError(
            f"pixels must be [images, 3, size, size] with a multiple of {self.stride} for size, "
            f"got {list(shape)}"
        )


@partial(jax.jit, static_argnums=2)
def _run_block(block: nnx.Module, x_IYXC: jax.Array, runtime: Runtime) -> jax.Array:
    """Part of the program around it, but traced once for all blocks that are alike."""
    return block(x_IYXC, runtime)


def _place(x_IYXC: jax.Array, runtime: Runtime) -> jax.Array:
    """The map where a mesh has it: whole on every device, as images are few."""
    partition = runtime.partition
    return x_IYXC if partition is None else partition.constrain(x_IYXC)


@encoder_of.register
def mobilenet_encoder(
    vision: MobileNetConfig, cfg: GemmaConfig, *, rngs: nnx.Rngs, layout: Layout
) -> MobileNetEncoder:
    """The encoder of `cfg.vision`. Its blocks are too few of a kind to be stacked."""
    return MobileNetEncoder(vision, rngs=rngs)
