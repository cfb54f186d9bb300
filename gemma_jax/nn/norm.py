"""RMSNorm as Gemma 1 to 3 have it, whose stored scale counts from one; LayerNorm for SigLIP."""

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.numerics import Numerics


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)` over the last axis (hf `Gemma3RMSNorm`).

    The scale is stored raw, as in checkpoints: folding the one in would round in bfloat16.
    """

    def __init__(self, dims: str, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(size), dims=dims)

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        dtype = jnp.float32 if numerics.norm_in_float32 else x.dtype
        wide = x.astype(dtype)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = 1 + self.scale[...].astype(dtype)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


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
