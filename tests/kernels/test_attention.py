"""One suite over every implementation of attention."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from marks import nightly

from gemma_kernels.attention import (
    IMPLEMENTATIONS,
    AttentionSpec,
    attention,
    attention_weights,
    causal_interval,
    last_of_block,
)
from gemma_kernels.attention.cases import CASES, Case
from gemma_kernels.attention.tpu.attention import Blocks, attention_tpu, default_blocks

# Not a library of another machine; and Mosaic GPU's interpreter is too slow for all cases, so the
# kernels for Hopper have files of their own.
HERE = [name for name in IMPLEMENTATIONS if name not in ("cudnn", "hopper")]
FAST = [name for name in HERE if name != "reference"]
# Windows, caches, padding, images, a cap, rings: the rest has no feature that these have not.
REST = [case for case in CASES if case.name.startswith(("one kv", "27B", "every head", "local, w"))]
BY_DAY = [case for case in CASES if case not in REST]
SMALL = Blocks(q=256, k=128, piece=128, fetch=2)  # many tiles in short sequences


def operands(case: Case, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(case.T), 3)
    q = jax.random.normal(keys[0], (case.B, case.T, case.N, case.H), dtype)
    k = jax.random.normal(keys[1], (case.B, case.S, case.K, case.H), dtype)
    v = jax.random.normal(keys[2], (case.B, case.S, case.K, case.H), dtype)
    q_pos, kv_pos = case.positions()
    last = last_of_block(jnp.asarray(q_pos), jnp.asarray(case.blocks()))
    lo, hi = causal_interval(jnp.asarray(q_pos), case.window, last)
    if not case.masked:
        lo, hi = jnp.zeros_like(lo), jnp.full_like(hi, case.S)
    return (q, k, v), dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=jnp.asarray(kv_pos))


@cache
def program(name, spec, interpret=True):
    return jax.jit(partial(call, name, spec=spec, interpret=interpret))


@cache
def gradients(name, spec):
    """Of a sum in which each number counts differently."""

    def loss(arrays, mask):
        out = call(name, *arrays, **mask, spec=spec)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    return jax.jit(jax.grad(loss))


def run(name, case, arrays, mask, interpret=True):
    return program(name, case.spec, interpret)(*arrays, **mask)


@cache
def expected(case: Case):
    """Result and gradients of the reference, for all implementations."""
    arrays, mask = operands(case)
    return run("reference", case, arrays, mask), gradients("reference", case.spec)(arrays, mask)


def call(name, *arrays, spec, interpret=True, **mask):
    """Kernels for other hardware run in Pallas' interpreter."""
    if name != "tpu":
        return attention(*arrays, **mask, spec=spec, implementation=name)
    return attention_tpu(*arrays, **mask, spec=spec, blocks=SMALL, interpret=interpret)


def test_reference_by_hand():
    """Two keys, scores 0 and ln 3: weights 1/4 and 3/4. The first query sees the first key only."""
    q = jnp.array([1.0, 1.0]).reshape(1, 2, 1, 1)
    k = jnp.array([0.0, np.log(3.0)]).reshape(1, 2, 1, 1)
    v = jnp.array([4.0, 8.0]).reshape(1, 2, 1, 1)
    pos = jnp.array([[0, 1]])
    lo, hi = causal_interval(pos)
    spec = AttentionSpec(scale=1.0)
    out = attention(
        q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec, implementation="reference"
    )
    np.testing.assert_allclose(out.ravel(), [4.0, 7.0], rtol=1e-6)
    weights = attention_weights(q, k, lo, hi, pos, spec)
    np.testing.assert_allclose(weights[0, 0], [[1, 0], [0.25, 0.75]], rtol=1e-6)


def test_soft_cap_by_hand():
    """A score of 100 under a cap of ln 3 becomes ln 3."""
    q, k = jnp.full((1, 1, 1, 1), 10.0), jnp.array([10.0, 0.0]).reshape(1, 2, 1, 1)
    spec = AttentionSpec(scale=1.0, soft_cap=float(np.log(3.0)))
    lo, hi = jnp.array([[0]]), jnp.array([[2]])
    weights = attention_weights(q, k, lo, hi, jnp.array([[0, 1]]), spec)
    np.testing.assert_allclose(weights.ravel(), [0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    "window, expected",
    [
        (None, ["1000", "1100", "1110", "1111"]),
        (2, ["1000", "1100", "0110", "0011"]),
        (1, ["1000", "0100", "0010", "0001"]),
    ],
)
def test_intervals_by_hand(window, expected):
    """A window of `w` keys counts the query's own."""
    lo, hi = causal_interval(jnp.arange(4)[None], window)
    seen = [[int(lo[0, t] <= s < hi[0, t]) for s in range(4)] for t in range(4)]
    assert ["".join(map(str, row)) for row in seen] == expected


@pytest.mark.parametrize(
    "window, expected",
    [
        # tokens 1 to 3 and 5 to 6 are images: within one, all see all; before it, causally
        (None, ["1000000", "1111000", "1111000", "1111000", "1111100", "1111111", "1111111"]),
        # a window of 2 cuts off what is before, inside an image too, and nothing of what follows
        (2, ["1000000", "1111000", "0111000", "0011000", "0001100", "0000111", "0000011"]),
    ],
)
def test_blocks_by_hand(window, expected):
    pos = jnp.arange(7)[None]
    block = jnp.array([[0, 1, 1, 1, 0, 2, 2]])
    lo, hi = causal_interval(pos, window, last_of_block(pos, block))
    seen = [[int(lo[0, t] <= s < hi[0, t]) for s in range(7)] for t in range(7)]
    assert ["".join(map(str, row)) for row in seen] == expected


def test_blocks_that_touch_and_blocks_beside_padding():
    pos = jnp.array([[-1, -1, 3, 4, 5, 6, -1]])
    block = jnp.array([[0, 0, 1, 1, 2, 2, 0]])
    assert last_of_block(pos, block).tolist() == [[-1, -1, 4, 4, 6, 6, -1]]


def test_padding_sees_nothing_and_is_not_seen():
    pos = jnp.array([[-1, 0, 1, -1]])
    lo, hi = causal_interval(pos)
    q = k = v = jnp.ones((1, 4, 1, 2))
    for name in HERE:
        mask = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos)
        out = call(name, q, k, v, **mask, spec=AttentionSpec(scale=1.0))
        np.testing.assert_array_equal(out[0, :, 0, 0], [0, 1, 1, 0])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("case", [*BY_DAY, *nightly(*REST)], ids=lambda case: case.name)
def test_forward_and_gradients(name, case):
    arrays, mask = operands(case)
    actual, (out, gradient) = run(name, case, arrays, mask), expected(case)
    np.testing.assert_allclose(actual, out, atol=2e-6)
    np.testing.assert_array_equal(actual, run(name, case, arrays, mask))
    for ours, theirs in zip(gradients(name, case.spec)(arrays, mask), gradient, strict=True):
        # Rows that see nothing have no gradient; the softmax of the reference makes nan of it.
        np.testing.assert_allclose(ours, np.nan_to_num(theirs), atol=1e-5)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("case", [CASES[1], *nightly(CASES[0], CASES[2])], ids=lambda c: c.name)
def test_bfloat16_errs_no_more_than_plain_code(name, case):
    """Error against float32 at most twice that of a plain bfloat16 softmax attention."""
    arrays, mask = operands(case, jnp.bfloat16)
    wide = tuple(a.astype(jnp.float32) for a in arrays)
    exact = np.asarray(run("reference", case, wide, mask))

    def plain(q, k, v):
        weights = attention_weights(q, k, *mask.values(), case.spec).astype(jnp.bfloat16)
        groups = case.N // case.K
        return jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, groups, axis=2))

    bound = 2 * np.abs(np.asarray(plain(*arrays), np.float32) - exact).max()
    actual = np.asarray(run(name, case, arrays, mask), np.float32)
    assert np.abs(actual - exact).max() <= bound


RACES = [
    CASES[1],
    *nightly(
        CASES[0],
        next(case for case in CASES if case.lengths),
        next(case for case in CASES if case.images),
    ),
]


@pytest.mark.parametrize("case", RACES, ids=lambda case: case.name)
def test_tpu_kernel_has_no_races(case):
    """Under the interpreter that imitates a TPU's memories and copies."""
    arrays, mask = operands(case)
    params = pltpu.InterpretParams(detect_races=True)
    out = jax.jit(lambda *a: call("tpu", *a, **mask, spec=case.spec, interpret=params))(*arrays)
    np.testing.assert_allclose(out, expected(case)[0], atol=2e-6)


@pytest.mark.nightly
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_tpu_kernel_on_drawn_calls(data):
    """Shapes, windows, images and positions that nobody thought of."""
    T = data.draw(st.integers(1, 300), "T")
    K, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]), "heads")
    first = data.draw(st.sampled_from([0, 7, 130, 100_000]), "first")
    held = min(first, data.draw(st.integers(0, 200), "cached keys"))
    window = data.draw(st.none() | st.integers(1, 260), "window")
    start = data.draw(st.integers(0, T - 1), "image")
    image = data.draw(st.integers(0, min(70, T - start)), "length of the image")
    case = Case(name="drawn", T=T, S=held + T, N=K * groups, K=K, window=window, first=first)
    pos = first - held + np.arange(held + T, dtype=np.int32)[None]
    pos = np.where(np.arange(held + T) < data.draw(st.integers(0, 9), "left padding"), -1, pos)
    block = np.zeros((1, T), np.int32)
    block[:, start : start + image] = 1
    lo, hi = causal_interval(
        jnp.asarray(pos[:, held:]), window, last_of_block(jnp.asarray(pos[:, held:]), block)
    )
    mask = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=jnp.asarray(pos))
    spec = replace(case.spec, window=None if image else window)
    arrays, _ = operands(replace(case, window=None))
    ours, theirs = (
        jax.jit(lambda *a, name=name: call(name, *a, **mask, spec=spec))(*arrays)
        for name in ("tpu", "reference")
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_tiles_of_the_tpu_kernel_are_checked():
    arrays, mask = operands(CASES[1])
    spec = CASES[1].spec
    for blocks, message in (
        (Blocks(q=100, k=128), "multiples of 128, got q=100"),
        (Blocks(q=256, piece=384), "piece=384 must divide q=256"),
        (Blocks(fetch=0), "fetch=0 must be at least 1"),
        (Blocks(q=2**17), r"heads of 16 needs \d+ MiB of VMEM; there are 48"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_tpu(*arrays, **mask, spec=spec, blocks=blocks, interpret=True)
    with pytest.raises(NotImplementedError, match="softmax is in float32 only"):
        narrow = replace(spec, softmax_in_float32=False)
        attention_tpu(*arrays, **mask, spec=narrow, interpret=True)
    with pytest.raises(NotImplementedError, match="needs a TPU; this program is for cpu"):
        attention(*arrays, **mask, spec=spec, implementation="tpu")


@pytest.mark.parametrize("window", [None, 512, 1024])
@pytest.mark.parametrize("N, K", [(4, 1), (8, 2), (8, 4), (16, 8), (32, 16), (16, 16)])
def test_default_tiles_fit_every_model(N, K, window):
    spec = AttentionSpec(scale=1.0, window=window)
    for length in (1, 130, 4096):
        blocks = default_blocks((1, length, N, 256), (1, length, K, 256), spec)
        shape = (1, length, N, 256), (1, length, K, 256)
        q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shape)
        ints = jax.ShapeDtypeStruct((1, length), jnp.int32)
        mask = dict(lo_BT=ints, hi_BT=ints, kv_pos_BS=ints)
        out = jax.eval_shape(
            lambda q, k, mask: attention_tpu(q, k, k, **mask, spec=spec, interpret=True), q, k, mask
        )
        assert out.shape == q.shape and blocks.q <= max(128, length + 127)


def test_memory_is_linear_in_the_length_for_a_window():
    """A [T, S] array anywhere would quadruple the temporaries when the length doubles."""

    def temporary_bytes(length):
        case = replace(CASES[0], T=length, S=length, window=64)
        arrays, mask = operands(case)
        compiled = jax.jit(
            lambda q, k, v: attention(q, k, v, **mask, spec=case.spec, implementation="xla")
        ).lower(*arrays)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.2 * temporary_bytes(2048)


def test_unknown_names_and_misfits_are_refused():
    arrays, mask = operands(CASES[0])
    spec = CASES[0].spec
    with pytest.raises(ValueError, match="unknown attention .*'fast'; choose one of: auto, tpu"):
        attention(*arrays, **mask, spec=spec, implementation="fast")
    q, k, v = arrays
    with pytest.raises(ValueError, match=r"v_BSKH has shape .* it needs"):
        attention(q, k, v[:, 1:], **mask, spec=spec)
    with pytest.raises(ValueError, match="query heads N=3 must be a multiple"):
        attention(q[:, :, :3], k, v, **mask, spec=spec)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        AttentionSpec(scale=1.0, window=0)


def test_a_call_nobody_serves_lists_every_reason(monkeypatch):
    def cannot(*args, **options):
        raise NotImplementedError("no such hardware")

    monkeypatch.setitem(IMPLEMENTATIONS, "xla", cannot)
    arrays, mask = operands(CASES[0])
    with pytest.raises(
        NotImplementedError,
        match="no attention .* fits: tpu: needs a TPU; .* cudnn: needs a GPU; .* xla: no such",
    ):
        attention(*arrays, **mask, spec=CASES[0].spec)
    with pytest.raises(NotImplementedError, match="^no such hardware"):
        attention(*arrays, **mask, spec=CASES[0].spec, implementation="xla")
