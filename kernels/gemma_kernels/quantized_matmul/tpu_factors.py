"""Scales and offsets as TPU kernels load them: they know no float16."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 8
VMEM = 56 * 2**20  # of 64 MiB in the smallest chips
SMALLEST = 2.0**-14  # normal number in float16
BIAS = (127 - 15) << 23  # between the exponents of float16 and float32


def loadable(x: jax.Array) -> jax.Array:
    """Numbers that a kernel can load; of float16 the bits, as int16, which are a copy."""
    return lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.float16 else x


def to_float32(x: jax.Array) -> jax.Array:
    """What `loadable` gave, as float32, exactly."""
    if x.dtype != jnp.int16:
        return x.astype(jnp.float32)
    bits = x.astype(jnp.int32) << 13
    size = lax.bitcast_convert_type((bits & 0x0FFFE000) + BIAS, jnp.float32)
    # Where the exponent is 0 there is no leading 1: SMALLEST / 2 too much, and half of the rest.
    size = jnp.minimum(size, size + size - SMALLEST)
    sign = bits & jnp.int32(-(2**31))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(size, jnp.int32) | sign, jnp.float32)


def outputs_of_a_step(O: int, most: int, unit: int, cores: int) -> int:
    """A multiple of `unit` up to `most`, of which few cover `O` with little left over, and each
    core as many."""
    most = max(min(most, O // cores) // unit, 1)
    covered = {n * unit: pl.cdiv(O, n * unit * cores) * n * unit for n in range(1, most + 1)}
    least = min(covered[n] for n in covered if 2 * n > most * unit)
    return max(n for n in covered if covered[n] == least and 2 * n > most * unit)
