"""Scales and offsets as TPU kernels load them: they know no float16."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 8
VMEM = 56 * 2**20  # of 64 MiB in the smallest chips
SMALLEST = 2.0**-14  # normal number in float16
STEP_CODES = 2**20
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


def outputs_of_a_step(I: int, O: int, most: int, unit: int, cores: int) -> int:
    """A multiple of `unit` up to `most` with which the steps of the busiest core cost the least.

    A step costs as much as `STEP_CODES` more codes would; one that goes beyond the end, or steps
    that cores do not share evenly, some of these.
    """
    fixed = STEP_CODES / I

    def cost(n: int) -> float:
        steps = pl.cdiv(O, n)
        uneven = O % n > 0 or steps % min(cores, steps) > 0
        return pl.cdiv(steps, cores) * (n + fixed) + 3 * fixed * uneven

    choices = range(unit, max(most, unit) + 1, unit)
    return min(choices, key=lambda n: (cost(n), -n))
