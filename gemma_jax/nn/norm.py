"""RMSNorm, whose stored scale counts from one up to Gemma 3; LayerNorm for SigLIP."""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.numerics import Numerics


class NormConfig(Protocol):
    """What a norm reads of the config of a decoder or a tower."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def norm_eps(self) -> float: ...

    @property
    def scale_plus_one(self) -> bool: ...


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)` over the last axis (hf `Gemma3RMSNorm`).

    The scale is stored raw, as in checkpoints: folding the one in would round in bfloat16.
    Gemma 3n multiplies by the scale itself (`cfg.scale_plus_one=False`; hf `Gemma3nRMSNorm`).

    Args:
      letter: Of the axis.
      size, eps: Default: those of `cfg`.
    """

    def __init__(
        self, cfg: NormConfig, letter: str, *, size: int | None = None, eps: float | None = None
    ):
        size = cfg.sizes[letter] if size is None else size
        self.eps, self.plus_one = cfg.norm_eps if eps is None else eps, cfg.scale_plus_one
        self.scale = nnx.Param(jnp.zeros(size) if self.plus_one else jnp.ones(size), dims=letter)

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        unit = _unit(x, self.eps, numerics)
        scale = self.scale[...].astype(unit.dtype)
        return (unit * (1 + scale if self.plus_one else scale)).astype(x.dtype)


def rms_norm(x: jax.Array, eps: float, numerics: Numerics) -> jax.Array:
    """RMSNorm without a scale."""
    return _unit(x, eps, numerics).astype(x.dtype)


def _unit(x: jax.Array, eps: float, numerics: Numerics) -> jax.Array:
    wide = x.astype(jnp.float32 if numerics.norm_in_float32 else x.dtype)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias` over the last axis, in float32."""

    def __init__(self, dims: str, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size), dims=dims)
        self.bias = nnx.Param(jnp.zeros(size), dims=dims)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        unit = wide * jax.lax.rsqrt(variance + self.eps)
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)
