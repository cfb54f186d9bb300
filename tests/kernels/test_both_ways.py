"""Attention of models that read both ways, by every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly
from test_attention import call

from gemma_kernels.attention import AttentionSpec, two_sided_interval
from gemma_kernels.attention.mask import visible
from gemma_kernels.attention.reference import attention_reference

T, LENGTHS = 300, (300, 170, 0)  # several tiles; a row that ends in the second; padding alone


def operands(reach: int | None):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, T, 3, 16))
    k, v = (jax.random.normal(key, (3, T, 1, 16)) for key in keys[1:])
    pos_BT = jnp.where(jnp.arange(T) < jnp.array(LENGTHS)[:, None], jnp.arange(T), -1)
    lo, hi = two_sided_interval(pos_BT, reach)
    return (q, k, v), dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos_BT)


@pytest.mark.parametrize("reach", [None, 3, 128])
def test_the_interval_is_the_distance(reach):
    _, mask = operands(reach)
    t = np.arange(T)
    for b, length in enumerate(LENGTHS):
        real = (t < length)[:, None] & (t < length)
        near = np.abs(t[:, None] - t) <= (T if reach is None else reach)
        np.testing.assert_array_equal(visible(**mask)[b], real & near)


@pytest.mark.parametrize("reach", [None, 3, *nightly(128)])
@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_same_as_the_definition(name, reach):
    arrays, mask = operands(reach)
    spec = AttentionSpec(scale=0.25)

    def total(run):
        weights = jax.random.normal(jax.random.key(1), arrays[0].shape)
        return lambda *a: ((out := run(*a)) * weights).sum() + (out**2).sum()

    def ours(*a):
        return call(name, *a, **mask, spec=spec)

    def theirs(*a):
        return attention_reference(*a, *mask.values(), spec)

    np.testing.assert_allclose(jax.jit(ours)(*arrays), theirs(*arrays), atol=2e-6)
    found = jax.jit(jax.grad(total(ours), (0, 1, 2)))(*arrays)
    for mine, expected in zip(found, jax.grad(total(theirs), (0, 1, 2))(*arrays)):
        np.testing.assert_allclose(mine, expected, atol=2e-5)
