"""The gradient of attention on TPU against that of the float32 reference, by the interpreter."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from marks import nightly

from gemma_kernels.attention import AttentionSpec, causal_interval, last_of_block
from gemma_kernels.attention.cases import CASES, Case
from gemma_kernels.attention.reference import attention_reference
from gemma_kernels.attention.tpu import backward as tpu_backward
from gemma_kernels.attention.tpu.backward import (
    BackwardBlocks,
    attention_backward_tpu,
    default_blocks,
)

SMALL = BackwardBlocks(128, 128, 128)  # many tiles in short sequences
WINDOWS = (  # more than one slot, piece and block, and edges that are no multiple of a tile
    (Case(name="a window over three tiles", T=700, S=700, K=1, window=300), SMALL),
    (Case(name="pieces narrower than blocks", T=1100, S=1100, window=400), (256, 128, 256)),
    (Case(name="tiles in parts", T=1100, S=1100, K=1, window=400), (512, 128, 256, None, 256)),
    (Case(name="a window narrower than blocks", T=900, S=900, K=1, window=130), (512, 128, 512)),
    (Case(name="a window over everything", T=300, S=300, window=4096), (256, 256, 128)),
    (Case(name="a chunk after a long cache", T=200, S=900, first=700, window=150), SMALL),
    (Case(name="far away", T=300, S=300, window=130), SMALL),
)


def operands(case: Case, dtype=jnp.float32, shift: int = 0):
    """q, k, v; the mask; cotangents of the result and of the log-sum-exp."""
    keys = jax.random.split(jax.random.key(case.T), 5)
    queries, memory = (case.B, case.T, case.N, case.H), (case.B, case.S, case.K, case.H)
    shapes = (queries, memory, memory, queries, queries[:3])
    q, k, v, dout, dlse = (jax.random.normal(*x, dtype) for x in zip(keys, shapes))
    q_pos, kv_pos = (jnp.where(x < 0, -1, x + shift) for x in case.positions())
    lo, hi = causal_interval(q_pos, case.window, last_of_block(q_pos, jnp.asarray(case.blocks())))
    if not case.masked:
        lo, hi = jnp.zeros_like(lo), jnp.full_like(hi, case.S)
    return (q, k, v), (lo, hi, kv_pos), (dout, dlse.astype(jnp.float32))


def expected(arrays, mask, cotangents, spec):
    """What attention returns, and its gradients; 0 for rows that see nothing."""

    @jax.jit
    def run(q, k, v, dout, dlse):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        both = partial(attention_reference, spec=spec, return_lse=True)
        (out, lse), pull = jax.vjp(lambda *qkv: both(*qkv, *mask), *wide)
        grads = pull((dout.astype(jnp.float32), jnp.where(lse > -jnp.inf, dlse, 0)))
        return (out, lse), [jnp.nan_to_num(g) for g in grads]

    return run(*arrays, *cotangents)


def actual(arrays, results, cotangents, mask, spec, blocks=SMALL, interpret=True):
    @jax.jit
    def run(q, k, v, out, lse, dout, dlse):
        operands = (q, k, v, out.astype(q.dtype), lse, dout, dlse, *mask)
        return attention_backward_tpu(*operands, spec, blocks=blocks, interpret=interpret)

    first, second = (run(*arrays, *results, *cotangents) for _ in range(2))
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one, other)
    return first


def check(case: Case, blocks=SMALL, interpret=True, spec=None, shift=0):
    arrays, mask, cotangents = operands(case, shift=shift)
    spec = spec or case.spec
    results, theirs = expected(arrays, mask, cotangents, spec)
    ours = actual(arrays, results, cotangents, mask, spec, blocks, interpret)
    for name, one, other in zip(("dq", "dk", "dv"), ours, theirs):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)


# The common suite takes all cases, with tiles that hold these whole.
MANY_TILES = [case for case in CASES if case.soft_cap or case.lengths or case.images]


@pytest.mark.parametrize(
    "case", [MANY_TILES[0], *nightly(*MANY_TILES[1:])], ids=lambda case: case.name
)
def test_gradients(case):
    check(case)


@pytest.mark.parametrize(
    "case, blocks",
    [WINDOWS[0], WINDOWS[5], *nightly(*WINDOWS[1:5], *WINDOWS[6:])],
    ids=lambda x: getattr(x, "name", ""),
)
def test_windows(case, blocks):
    shift = 100_000 if case.name == "far away" else 0
    check(case, blocks if blocks is SMALL else BackwardBlocks(*blocks), shift=shift)


def test_a_row_in_parts():
    """Keys that do not fit together: dq is the sum over the parts."""
    check(replace(CASES[0], T=300, S=500, first=200), BackwardBlocks(128, 128, 128, row=256))


def test_a_window_too_wide_for_a_ring(monkeypatch):
    """Then its keys come as rows, in parts."""
    monkeypatch.setattr(tpu_backward, "_vmem_limit", lambda: 2**20)
    check(Case(name="wide", T=300, S=300, K=1, window=200))


@pytest.mark.parametrize("window", [100, *nightly(None)])
def test_a_mask_that_the_spec_states(window):
    case = Case(name="causal", T=300, S=300, K=1, window=window)
    arrays, mask, cotangents = operands(case)
    results, theirs = expected(arrays, mask, cotangents, case.spec)
    spec = replace(case.spec, causal=True)
    ours = actual(arrays, results, cotangents, (None, None, None), spec)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_keys_in_any_order():
    """As in a ring buffer, with free slots: positions decide, not rows."""
    case = Case(name="shuffled", T=200, S=400, first=150)
    arrays, (lo, hi, kv_pos), cotangents = operands(case)
    kv_pos = jax.random.permutation(jax.random.key(0), kv_pos, axis=1)
    results, theirs = expected(arrays, (lo, hi, kv_pos), cotangents, case.spec)
    ours = actual(arrays, results, cotangents, (lo, hi, kv_pos), case.spec)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [150, *nightly(None)])
def test_bfloat16_errs_no_more_than_plain_code(window):
    """Error against float32 at most twice that of the gradient of plain bfloat16 attention."""
    case = Case(name="bfloat16", T=300, S=300, window=window, H=128)
    arrays, mask, cotangents = operands(case, jnp.bfloat16)
    results, exact = expected(arrays, mask, cotangents, case.spec)
    seen = (mask[2][0] >= mask[0][0, :, None]) & (mask[2][0] < mask[1][0, :, None])

    @jax.jit
    def plain(q, k, v, dout, dlse):
        def attend(q, k, v):
            k, v = (jnp.repeat(x, case.N // case.K, axis=2) for x in (k, v))
            scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * case.spec.scale
            scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
            lse = jnp.moveaxis(jax.nn.logsumexp(scores, axis=-1), 1, 2)
            return jnp.einsum("BNTS,BSNH->BTNH", weights, v), lse

        return jax.vjp(attend, q, k, v)[1]((dout, dlse))

    ours = actual(arrays, results, cotangents, mask, case.spec)
    assert [g.dtype for g in ours] == [jnp.bfloat16] * 3
    for one, other, truth in zip(ours, plain(*arrays, *cotangents), exact):
        errors = [np.abs(np.asarray(g, np.float32) - truth).max() for g in (one, other)]
        assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("window", [100, *nightly(None)])
def test_no_races(window):
    """Under the interpreter that imitates a TPU's memories and copies."""
    case = Case(name="races", T=300, S=300, K=1, window=window)
    check(case, interpret=pltpu.InterpretParams(detect_races=True))


@pytest.mark.nightly
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_calls(data):
    """Shapes, windows, images and positions that nobody thought of."""
    T = data.draw(st.integers(1, 300), "T")
    K, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]), "heads")
    held = data.draw(st.integers(0, 200), "cached keys")
    window = data.draw(st.none() | st.integers(1, 260), "window")
    start = data.draw(st.integers(0, T - 1), "image")
    image = data.draw(st.integers(0, min(70, T - start)), "length of the image")
    case = Case(name="drawn", T=T, S=held + T, N=K * groups, K=K, window=window, first=held)
    if image:
        case = replace(case, images=((start, start + image),))
    cap = data.draw(st.none() | st.sampled_from([2.0, 50.0]), "soft cap")
    shift = data.draw(st.sampled_from([0, 131_072]), "shift")
    check(case, spec=replace(case.spec, soft_cap=cap), shift=shift)


def test_tiles_are_checked():
    for sizes, message in (
        ((100, 100, 128), "multiples of 128, got q=100"),
        ((256, 192, 128), "multiples of 128, got piece=192"),
        ((256, 384, 128), "q=256 must be a multiple of piece=384"),
        ((256, 128, 256, 384), "row=384 must be a multiple of k=256"),
        ((512, 128, 256, None, 384), "part=384 must be a multiple of piece=128 and divide q=512"),
    ):
        with pytest.raises(ValueError, match=message):
            BackwardBlocks(*sizes)
    arrays, mask, cotangents = operands(CASES[1])
    run = partial(attention_backward_tpu, *arrays, arrays[0], cotangents[1], *cotangents, *mask)
    with pytest.raises(ValueError, match="with a window, q=128 must be a multiple of k=256"):
        run(CASES[1].spec, blocks=BackwardBlocks(128, 128, 256))
    with pytest.raises(NotImplementedError, match="softmax is in float32 only"):
        run(replace(CASES[1].spec, softmax_in_float32=False))


@pytest.mark.parametrize("window", [None, 512, 1024])
def test_default_tiles_fit(window):
    spec = AttentionSpec(scale=1.0, window=window)
    for T, S in itertools.product((1, 130, 4096), repeat=2):
        blocks = default_blocks((1, T, 8, 256), (1, S, 4, 256), spec, jnp.dtype(jnp.bfloat16))
        assert blocks.q < T + 128 and blocks.k < max(T, S) + 128
        assert window is None or blocks.q % blocks.k == 0
