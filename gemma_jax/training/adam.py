"""Adam's direction, with its bias taken out as exactly as float32 can.

optax computes `1 - b2**t` from `b2` rounded to float32: at 0.999 that is 1.3e-5 off, and all of the
first updates are 6e-6 too small, which shows beside torch's, whose factors are Python numbers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamState(NamedTuple):
    """Attributes: `count`: int32, updates so far. `mean`, `square`: running means, as params."""

    count: jax.Array
    mean: optax.Params
    square: optax.Params


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Makes `m / (sqrt(v) + eps)` of running means `m` of gradients and `v` of their squares.

    Kingma and Ba, 2015; both means are divided by `1 - b**t`, so that they do not begin too low.
    """

    def init(params: optax.Params) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(gradients, state: AdamState, params=None):
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, gradients)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, gradients)
        c1, c2 = (_one_minus_power(b, count) for b in (b1, b2))
        updates = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mean, square)
        return updates, AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def _one_minus_power(base: float, exponent: jax.Array) -> jax.Array:
    """`1 - base**exponent`, without the loss of digits where the power is nearly 1."""
    if base == 0:
        return jnp.float32(1)
    return -jnp.expm1(math.log(base) * exponent.astype(jnp.float32))
