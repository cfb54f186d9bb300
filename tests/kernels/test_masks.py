"""Masks as intervals: packed documents, encoders, masks that the spec states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import nightly

from gemma_kernels.attention import (
    AttentionSpec,
    attention,
    causal_interval,
    first_of_document,
    last_of_block,
    two_sided_interval,
)


def seen(lo, hi, length):
    return np.array([[int(lo[0, t] <= s < hi[0, t]) for s in range(length)] for t in range(length)])


def draws(length, B=1, S=None, N=2, K=1, H=8):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = (B, length, N, H), (B, S or length, K, H), (B, S or length, K, H)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_mask_is_an_ascending_interval(data):
    """Against the masks of the models written out pair by pair."""
    length = data.draw(st.sampled_from([1, 2, 9, 24]), "length")  # programs of four shapes
    window = data.draw(st.none() | st.integers(1, 30), "window")
    cuts = sorted(data.draw(st.sets(st.integers(1, 23), max_size=3), "documents"))
    document = np.searchsorted(cuts, np.arange(length), side="right")
    block = np.zeros(length, int)
    for number in (1, 2):
        start = data.draw(st.integers(0, length), "image")
        stop = min(start + data.draw(st.integers(0, 9), "its length"), length)
        inside = np.arange(start, stop)
        if len(inside) and not block[inside].any() and len(set(document[inside])) == 1:
            block[inside] = number
    pos = jnp.arange(length)[None]
    lo, hi = causal_interval(
        pos,
        window,
        last_of_block(pos, jnp.asarray(block)[None]),
        first_of_document(jnp.asarray(document)[None]),
    )
    q, k = np.arange(length)[:, None], np.arange(length)
    same_image = (block[q] == block[k]) & (block[q] > 0)
    expected = ((k <= q) | same_image) & (document[q] == document[k])
    if window is not None:
        expected &= k > q - window
    np.testing.assert_array_equal(seen(lo, hi, length), expected)
    assert np.all(np.diff(lo[0]) >= 0) and np.all(np.diff(hi[0]) >= 0)


def test_an_encoder_sees_both_ways_within_reach_and_document():
    pos = jnp.arange(6)[None]
    lo, hi = two_sided_interval(pos, reach=1)
    expected = ["110000", "111000", "011100", "001110", "000111", "000011"]
    assert ["".join(map(str, row)) for row in seen(lo, hi, 6)] == expected
    document = jnp.array([[0, 0, 0, 1, 1, 1]])
    lo, hi = two_sided_interval(
        pos, None, first_of_document(document), last_of_block(pos, document + 1)
    )
    assert ["".join(map(str, row)) for row in seen(lo, hi, 6)] == ["111000"] * 3 + ["000111"] * 3
    lo, hi = two_sided_interval(jnp.array([[-1, 3]]), reach=2)
    assert (lo.tolist(), hi.tolist()) == ([[0, 1]], [[0, 6]])


def test_packed_documents_are_as_if_alone():
    q, k, v = draws(20)
    document = jnp.array([[0] * 7 + [1] * 13])
    pos = jnp.arange(20)[None]
    lo, hi = causal_interval(pos, 5, first_BT=first_of_document(document))
    spec = AttentionSpec(scale=0.3, window=5)
    packed = attention(q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec)
    alone = AttentionSpec(scale=0.3, window=5, causal=True)
    for part in (slice(0, 7), slice(7, 20)):
        expected = attention(q[:, part], k[:, part], v[:, part], spec=alone)
        np.testing.assert_allclose(packed[:, part], expected, atol=2e-6)


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize("window", [None, 3, 300])
@pytest.mark.parametrize("T, S", [(200, 210), *nightly((9, 9), (4, 9))])
def test_a_stated_mask_is_the_one_written_out(name, window, T, S):
    q, k, v = draws(T, S=S)
    stated = AttentionSpec(scale=0.3, window=window, causal=True)
    actual = attention(q, k, v, spec=stated, implementation=name)
    pos = jnp.arange(S)[None]
    lo, hi = causal_interval(pos[:, S - T :], window)
    spec = AttentionSpec(scale=0.3)
    expected = attention(
        q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec, implementation="reference"
    )
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_no_mask_needs_no_operands():
    q, k, v = draws(9, S=5)
    spec = AttentionSpec(scale=0.3, masked=False)
    expected = attention(q, k, v, spec=spec, implementation="reference")
    np.testing.assert_allclose(attention(q, k, v, spec=spec), expected, atol=2e-6)


@pytest.mark.parametrize(
    "T, S, window", [(300, 300, 20), *nightly((5, 40, None), (300, 1100, None))]
)
def test_parts_of_the_keys_merge_by_their_log_sum_exp(T, S, window):
    """What sequence-parallel attention does; and gradients flow through the merge."""
    q, k, v = draws(T, S=S)
    pos = jnp.arange(S)[None]
    lo, hi = causal_interval(pos[:, S - T :], window)
    cut = S // 3

    def whole(q, k, v):
        mask = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos)
        spec = AttentionSpec(scale=0.3)
        return attention(q, k, v, **mask, spec=spec, return_lse=True, implementation="reference")

    def merged(q, k, v):
        parts = []
        for part in (slice(0, cut), slice(cut, S)):
            mask = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos[:, part])
            spec = AttentionSpec(scale=0.3)
            parts.append(attention(q, k[:, part], v[:, part], **mask, spec=spec, return_lse=True))
        outs, lses = (jnp.stack(x) for x in zip(*parts))
        lse = jax.nn.logsumexp(lses, axis=0)
        return jnp.sum(outs * jnp.exp(lses - lse)[..., None], axis=0), lse

    for ours, theirs in zip(jax.jit(merged)(q, k, v), jax.jit(whole)(q, k, v)):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)

    def loss(function):
        def value(q, k, v):
            out, lse = function(q, k, v)
            return jnp.sum(jnp.sin(7 * out)) + jnp.sum(jnp.cos(lse))

        return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(q, k, v)

    for ours, theirs in zip(loss(merged), loss(whole)):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_nothing_seen_has_lse_of_minus_infinity_and_no_gradient():
    q, k, v = draws(3)
    pos = jnp.array([[0, 1, 2]])
    lo, hi = jnp.array([[0, 0, 0]]), jnp.array([[1, 0, 3]])

    def call(q):
        mask = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos)
        return attention(q, k, v, **mask, spec=AttentionSpec(scale=1.0), return_lse=True)

    out, lse = call(q)
    assert np.isneginf(lse[0, 1]).all() and np.isfinite(lse[0, 0]).all()
    assert not out[0, 1].any()

    def value(q):
        out, lse = call(q)
        return jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    gradient = jax.grad(value)(q)
    assert np.isfinite(gradient).all() and not gradient[0, 1].any()


def test_masks_that_contradict_are_refused():
    q, k, v = draws(4, S=6)
    pos = jnp.arange(6)[None]
    lo, _ = causal_interval(pos[:, 2:])
    causal = AttentionSpec(scale=1.0, causal=True)
    with pytest.raises(ValueError, match="causal=True states the whole mask; leave out lo_BT"):
        attention(q, k, v, lo_BT=lo, spec=causal)
    with pytest.raises(ValueError, match="a mask is missing hi_BT, kv_pos_BS; or state it by"):
        attention(q, k, v, lo_BT=lo, spec=AttentionSpec(scale=1.0))
    with pytest.raises(ValueError, match="got T=6 queries, S=4 keys"):
        attention(k, q[:, :, :1], q[:, :, :1], spec=causal)
    with pytest.raises(ValueError, match="masked=False means that every query sees every key"):
        AttentionSpec(scale=1.0, masked=False, causal=True)
    with pytest.raises(ValueError, match="q_BTNH is int32"):
        attention(q.astype(jnp.int32), k, v, spec=causal)
    with pytest.raises(ValueError, match=r"k_BSKH has shape \(6, 1, 8\); it needs four"):
        attention(q, k[0], v, spec=causal)
    with pytest.raises(NotImplementedError, match="needs a GPU; this program is for cpu"):
        attention(q, k, v, spec=causal, implementation="cudnn")
