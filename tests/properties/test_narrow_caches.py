"""Keys and values kept as int8: the same however tokens arrive, and near to what they stand for."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from marks import nightly

from gemma_jax import Runtime, cache_bytes, forward, generate, init_cache, matformer
from gemma_jax.placement import shard
from gemma_jax.sharding import make_mesh
from gemma_jax.weights.int8 import to_int8

LENGTH = 4 * tiny.WINDOW + 3  # several wraps of every ring
CONFIGS = {"gemma3": tiny.gemma3(2, every=2), "gemma3n": tiny.gemma3n(6, 3)}
CONFIGS["gemma4"] = tiny.gemma4()


def with_caches(cfg, dtype):
    return tiny.model(cfg, "unrolled", cache_dtype=jnp.dtype(dtype))


def logits(model, ids, cuts, dtype):
    """Of consecutive passes over one cache."""
    cache = init_cache(model.cfg, model.layer_groups, len(ids), 64, dtype)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        out = forward(model, ids[:, start:end], cache=cache)
        cache = out.cache
        parts.append(np.asarray(out.logits))
    return np.concatenate(parts, axis=1)


@settings(max_examples=50, deadline=None)
@given(
    scale=st.floats(1e-20, 1e20),
    zeros=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_int8_is_off_by_half_a_scale_at_most(scale, zeros, dtype, seed):
    x_BKTH = scale * jax.random.normal(jax.random.key(seed), (2, 3, 5, 16))
    x_BKTH = jnp.where(zeros, x_BKTH.at[0, 1].set(0.0), x_BKTH).astype(dtype)
    values, scale_BKT = to_int8(x_BKTH, (3,))
    assert values.dtype == jnp.int8 and scale_BKT.shape == (2, 3, 5)
    error = np.abs(values * scale_BKT[..., None] - x_BKTH.astype(jnp.float32))
    assert (error <= 0.501 * scale_BKT[..., None]).all()
    np.testing.assert_array_equal(np.abs(values).max(3), np.where(x_BKTH.any(3), 127, 0))


@pytest.mark.parametrize("family", ["gemma3n", *nightly("gemma3", "gemma4")])
def test_layout_of_the_prompt_changes_nothing(family):
    """Pieces, single tokens and one pass agree far better than int8 and float32 do.

    Not to the last digit: sums in another order can turn a rounding to int8.
    """
    model = tiny.model(CONFIGS[family])
    ids = tiny.tokens(model.cfg, 2, LENGTH)
    whole, wide = logits(model, ids, [], "int8"), logits(model, ids, [], "float32")
    rounding = np.abs(whole - wide)
    assert 0 < rounding.mean() < 0.05 * wide.std()
    # Pieces join old and new keys of a ring; single tokens go to the kernels for decoding.
    cuts = [7, 14, *range(15, 15 + tiny.WINDOW + 6)]  # programs for 7 tokens and for one
    found = np.abs(logits(model, ids, cuts, "int8") - whole)
    assert found.max() < 0.2 * rounding.max() and np.median(found) < 0.02 * np.median(rounding)


def test_memory():
    cfg = tiny.gemma3n()
    cache = init_cache(cfg, tiny.model(cfg).layer_groups, 2, 64, "int8")
    held = sum(array.nbytes for array in jax.tree.leaves(cache.layers))
    assert held == cache_bytes(cfg, 2, 64, "int8")
    wide = cache_bytes(cfg, 2, 64, "float32")
    assert held * 4 * cfg.head_dim == wide * (cfg.head_dim + 4)  # a float32 scale for each head


@pytest.mark.parametrize(
    "family, dtype",
    [("gemma3n", "int8"), *nightly(("gemma3", "int8"), ("gemma3", "bfloat16"))],
)
def test_generation(family, dtype):
    """A session writes what passes over the same cache choose, for rows of any length."""
    model = with_caches(CONFIGS[family], dtype)
    rows = [tiny.tokens(model.cfg, 1, n)[0].tolist() for n in (20, 4)]
    together = generate(model, None, rows, max_new_tokens=8)
    for row, done in zip(rows, together):
        ids = np.asarray([row + done.token_ids])
        cuts = range(4, ids.shape[1], 4)  # one program for all
        chosen = logits(model, ids, cuts, dtype).argmax(-1)[0, len(row) - 1 : -1]
        assert chosen.tolist() == done.token_ids


@pytest.mark.parametrize("axes", [{"sequence": 2, "tensor": 2}, *nightly({"data": 2, "tensor": 4})])
def test_on_a_mesh(axes):
    """Heads split as far as there are some, shared by more devices, and slots split."""
    model = with_caches(CONFIGS["gemma3"], "int8")
    mesh = make_mesh(model.cfg, jax.devices()[: math.prod(axes.values())], **axes)
    rows = tiny.tokens(model.cfg, 2, 13).tolist()
    expected = generate(model, None, rows, max_new_tokens=8)
    found = generate(shard(model, mesh), None, rows, max_new_tokens=8)
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]


@pytest.mark.nightly
def test_speculation_over_shared_caches():
    model = with_caches(CONFIGS["gemma3n"], "int8")
    rows = [[3, 5, 7], [2, 4, 6, 8]]
    draft = matformer.Slice(ffn_widths=(20, 30, 48, 7, 8, 9))
    expected = generate(model, None, rows, max_new_tokens=12)
    found = generate(model, None, rows, max_new_tokens=12, draft=draft, draft_tokens=2)
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]


def test_weights_of_attention_are_those_of_rounded_keys():
    cfg = CONFIGS["gemma3"]
    model = tiny.model(cfg)
    ids = tiny.tokens(cfg, 1, 12)
    cache = init_cache(cfg, model.layer_groups, 1, 12, "int8")
    found = forward(model, ids, cache=cache, capture=("attention_weights",)).captured
    wide = forward(model, ids, capture=("attention_weights",)).captured
    # Rings of 8 slots are read with the new keys after them: the last 12 are those of the text.
    for a, b in zip(found["attention_weights"], wide["attention_weights"]):
        np.testing.assert_allclose(a[..., -12:], b, atol=0.05)
        np.testing.assert_allclose(a.sum(-1), 1.0, rtol=1e-5)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="cache_dtype=int4 must be 'float32', 'bfloat16' or"):
        Runtime(cache_dtype=jnp.dtype("int4"))
