"""Kernels for Hopper in the interpreter of Mosaic GPU, which also looks for races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_kernels.attention import (
    AttentionSpec,
    attention_weights,
    causal_interval,
    last_of_block,
)
from gemma_kernels.attention.hopper.attention import attention_hopper
from gemma_kernels.attention.hopper.forward import Blocks, check_blocks
from gemma_kernels.attention.hopper.tiles import classify, runs
from gemma_kernels.attention.mask import visible
from gemma_kernels.attention.reference import attention_reference
from gemma_kernels.decode_attention.hopper import decode_attention_hopper, default_splits

SLOW = jax.__version_info__ < (0, 11)  # its interpreter takes a minute per case
later_only = pytest.mark.skipif(SLOW, reason="the interpreter of jax 0.10 takes a minute for it")
SMALL = Blocks(64, 64, 2)


def operands(T, S, N=2, K=1, H=64, B=1, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(T + S), 3)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def exact(q, k, v, lo, hi, pos, spec):
    """Output and log-sum-exp, dense and in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    scores = spec.scale * jnp.einsum(
        "btnh,bsnh->bnts", q, jnp.repeat(k, groups, 2), precision="highest"
    )
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    lse = jax.nn.logsumexp(scores, axis=-1, where=visible(lo, hi, pos)[:, None])
    return attention_reference(q, k, v, lo, hi, pos, spec), jnp.swapaxes(lse, 1, 2)


def assert_close(got, arrays, mask, spec):
    """At most twice the error of a plain softmax attention in the dtype of the queries."""
    expected, lse = exact(*arrays, *mask, spec)
    q, k, v = (x.astype(arrays[0].dtype) for x in arrays)
    weights = attention_weights(q, k, *mask, spec).astype(v.dtype)
    groups = q.shape[2] // k.shape[2]
    plain = jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, groups, axis=2))
    error, allowed = (jnp.abs(x.astype(jnp.float32) - expected).max() for x in (got[0], plain))
    assert float(error) <= 2 * float(allowed)
    np.testing.assert_allclose(got[1], lse, atol=1e-4)


def in_order(B, S):
    return jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))


# name -> T, S, shapes, spec's arguments; keys in order, queries at their end
STATIC = {
    "causal, groups, ragged lengths": (130, 150, dict(N=2, K=1), dict(causal=True)),
    "window that is no multiple of a tile": (130, 260, dict(N=1), dict(causal=True, window=70)),
    "one query, one key": (1, 1, {}, dict(causal=True)),
    "no mask, heads of 72": (70, 77, dict(H=72), dict(masked=False)),
    "heads of 128, soft cap": (64, 64, dict(N=1, H=128), dict(causal=True, soft_cap=2.0)),
    "heads of 256": (64, 64, dict(N=1, H=256), dict(causal=True)),
}


@pytest.mark.parametrize("name", STATIC)
def test_masks_known_at_compile_time(name):
    T, S, shape, facts = STATIC[name]
    if SLOW and name != "window that is no multiple of a tile":
        pytest.skip("the interpreter of jax 0.10 takes a minute for it")
    arrays = operands(T, S, **shape)
    spec = AttentionSpec(scale=arrays[0].shape[3] ** -0.5, **facts)
    pos = in_order(1, S)
    lo, hi = causal_interval(pos[:, S - T :], spec.window)
    if not spec.masked:
        lo, hi = jnp.zeros_like(lo), jnp.full_like(hi, S)
    got = run(arrays, (None, None, None), spec)
    assert_close(got, arrays, (lo, hi, pos), spec)


def run(arrays, mask, spec, **options):
    call = jax.jit(
        lambda q, k, v: attention_hopper(
            q, k, v, *mask, spec, return_lse=True, blocks=SMALL, interpret=True, **options
        )
    )
    return call(*arrays)


def intervals(name):
    """Positions and intervals by name: `T, lo, hi, kv_pos`."""
    if name == "images across tile borders":
        pos = in_order(1, 200)
        block = jnp.zeros((1, 200), jnp.int32).at[:, 50:140].set(1)
        return 200, *causal_interval(pos, 48, last_of_block(pos, block)), pos
    if name == "a ring, positions beyond 100,000":
        slots = jnp.arange(128)
        pos = (100_070 - (70 - slots) % 128).astype(jnp.int32)[None]
        query = jnp.arange(100_067, 100_071, dtype=jnp.int32)[None]
        return 4, *causal_interval(query, 128), pos
    if name == "ragged rows, and one of padding":
        t, lengths = jnp.arange(140), jnp.array([[140], [30], [0]])
        pos = jnp.where(t < lengths, t, -1).astype(jnp.int32)
        return 140, *causal_interval(pos), pos
    if name == "keys in any order":
        pos = jax.random.permutation(jax.random.key(0), in_order(1, 150), axis=1) - 5
        pos = jnp.maximum(pos, -1)
        lo, width = jax.random.randint(jax.random.key(1), (2, 1, 70), -10, 150, jnp.int32)
        return 70, lo, lo + jnp.maximum(width - 60, 0), pos
    raise KeyError(name)


@pytest.mark.parametrize(
    "name",
    [
        "images across tile borders",
        "a ring, positions beyond 100,000",
        "ragged rows, and one of padding",
        "keys in any order",
    ],
)
@later_only
def test_masks_as_intervals(name):
    T, lo, hi, pos = intervals(name)
    arrays = operands(T, pos.shape[1], N=1, B=len(pos))
    spec = AttentionSpec(scale=0.125)
    out, lse = run(arrays, (lo, hi, pos), spec)
    assert_close((out, lse), arrays, (lo, hi, pos), spec)
    empty = ~visible(lo, hi, pos).any(-1)
    assert not jnp.any(jnp.where(empty[:, :, None, None], out, 0))
    assert jnp.array_equal(lse == -jnp.inf, jnp.broadcast_to(empty[:, :, None], lse.shape))


@later_only
def test_float16_and_a_second_run():
    arrays = operands(64, 64, N=1, dtype=jnp.float16)
    spec = AttentionSpec(scale=-0.2, causal=True)  # any sign
    first, second = (run(arrays, (None, None, None), spec) for _ in range(2))
    pos = in_order(1, 64)
    assert_close(first, arrays, (*causal_interval(pos), pos), spec)
    assert all(jnp.array_equal(a, b) for a, b in zip(first, second))


@later_only
def test_gradients():
    """Through the output and through the log-sum-exp."""
    T, S = 64, 70
    arrays = operands(T, S)
    pos = in_order(1, S)
    mask = (*causal_interval(pos[:, S - T :], 40), pos)
    spec = AttentionSpec(scale=0.125)
    weights = jax.random.normal(jax.random.key(5), (T, 64))

    def loss(out, lse):
        return jnp.sum(out.astype(jnp.float32) * weights[:, None]) + jnp.sum(jnp.sin(lse))

    def ours(q, k, v):
        options = dict(return_lse=True, blocks=SMALL, interpret=True)
        return loss(*attention_hopper(q, k, v, *mask, spec, **options))

    got = jax.jit(jax.grad(ours, (0, 1, 2)))(*arrays)
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = jax.grad(lambda *qkv: loss(*exact(*qkv, *mask, spec)), (0, 1, 2))(*wide)
    for ours, theirs in zip(got, expected):
        error = jnp.abs(ours.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        assert float(error) < 0.02


@later_only
def test_vmap():
    arrays = [jnp.stack([x, -x]) for x in operands(8, 8, N=1)]
    spec = AttentionSpec(scale=0.125, causal=True)

    def call(q, k, v):
        return attention_hopper(q, k, v, None, None, None, spec, blocks=SMALL, interpret=True)

    got = jax.jit(jax.vmap(call))(*arrays)
    expected = call(*(x[:, 0] for x in arrays))
    assert jnp.array_equal(got[:, 0], expected)


def test_runs_of_blocks():
    """A causal window of 16 over tiles of 8 queries and blocks of 4 keys, by hand."""
    pos = in_order(1, 64)
    got = runs(*classify(*causal_interval(pos, 16), pos, 8, 4))
    assert got.first[0].tolist() == [0, 0, 0, 2, 4, 6, 8, 10]
    assert got.whole[0].tolist() == [2, 0, 2, 4, 6, 8, 10, 12]
    assert got.whole_end[0].tolist() == [2, 2, 4, 6, 8, 10, 12, 14]
    assert got.end[0].tolist() == [2, 4, 6, 8, 10, 12, 14, 16]


def test_runs_hold_what_is_seen():
    """For any intervals and any order of keys: nothing seen is dead, whole blocks are seen."""
    rng = np.random.default_rng(0)
    flags = jax.jit(lambda *mask: (visible(*mask), *runs(*classify(*mask, 8, 4))))
    for _ in range(50):
        pos = np.maximum(rng.permutation(30)[None] - 3, -1).astype(np.int32)
        if rng.random() < 0.5:
            pos = np.sort(pos, axis=1)
        lo = rng.integers(-2, 30, (1, 21)).astype(np.int32)
        hi = lo + rng.integers(-2, 30, (1, 21)).astype(np.int32)
        seen, *bounds = (np.asarray(x[0]) for x in flags(lo, hi, pos))
        seen = np.pad(seen, ((0, 3), (0, 2)))
        some = np.pad(np.maximum(lo[0], 0) < hi[0], (0, 3))
        for i, (first, whole, whole_end, end) in enumerate(zip(*bounds)):
            rows = slice(8 * i, 8 * i + 8)
            assert not seen[rows, : 4 * first].any() and not seen[rows, 4 * end :].any()
            assert seen[rows][some[rows], 4 * whole : 4 * whole_end].all()
            assert 0 <= first <= whole <= whole_end <= end


@pytest.mark.parametrize(
    "blocks, width", [(Blocks(32, 64, 2), 128), (Blocks(64, 8, 2), 128), (Blocks(64, 128, 3), 256)]
)
def test_bad_blocks(blocks, width):
    with pytest.raises(ValueError, match="Blocks"):
        check_blocks(blocks, width)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype=jnp.float32), "round float32"),
        (dict(H=320), "320 wide"),
        (dict(S=0), "at least one query"),
    ],
)
def test_calls_that_are_refused(change, reason):
    arrays = operands(**(dict(T=8, S=8) | change))
    with pytest.raises(NotImplementedError, match=reason):
        attention_hopper(*arrays, None, None, None, AttentionSpec(scale=1.0, causal=True))


def cache(name):
    """`T, lo, hi, kv_pos` of a decoding step."""
    if name == "full, ragged":
        slots, lengths = jnp.arange(200), jnp.array([[200], [37], [0]])
        pos = jnp.where(slots < lengths, slots, -1).astype(jnp.int32)
        return 1, *causal_interval(lengths.astype(jnp.int32) - 1), pos
    if name == "ring, three tokens":
        slots = jnp.arange(128)
        pos = (100_070 - (70 - slots) % 128).astype(jnp.int32)[None]
        query = jnp.arange(100_068, 100_071, dtype=jnp.int32)[None]
        return 3, *causal_interval(query, 100), pos
    raise KeyError(name)


@pytest.mark.parametrize("name", ["full, ragged", "ring, three tokens"])
@pytest.mark.parametrize("int8", [False, True])
def test_decoding(name, int8):
    if SLOW:
        pytest.skip("the interpreter of jax 0.10 takes a minute for it")
    T, lo, hi, pos = cache(name)
    S = pos.shape[1]
    q, k, v = operands(T, S, N=4, K=2, B=len(pos))
    scales = {}
    k_cache, v_cache = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    if int8:
        k_scale, v_scale = (
            jnp.abs(x).max(-1).astype(jnp.float32) / 127 for x in (k_cache, v_cache)
        )
        k_cache, v_cache = (
            jnp.round(x.astype(jnp.float32) / scale[..., None]).astype(jnp.int8)
            for x, scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        scales = dict(k_scale_BKS=k_scale, v_scale_BKS=v_scale)
        k, v = (
            jnp.swapaxes(x.astype(jnp.float32) * scale[..., None], 1, 2)
            for x, scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
    spec = AttentionSpec(scale=0.125)
    call = jax.jit(
        lambda q, k, v, scales: decode_attention_hopper(
            q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec, **scales,
            return_lse=True, splits=2, interpret=True,
        )
    )  # fmt: skip
    got = call(q, k_cache, v_cache, scales)
    assert_close(got, (q, k, v), (lo, hi, pos), spec)


@later_only
@pytest.mark.parametrize("int8", [False, True])
def test_decoding_from_a_stack_of_layers(int8):
    """The same numbers as from the layer alone."""
    q, *_ = operands(1, 128, B=2)
    random = np.random.default_rng(0)
    k, v = random.integers(-127, 128, (2, 3, 2, 1, 128, 64))  # layers, batch, heads, slots
    stacks = {"k_BKSH": k, "v_BKSH": v}
    stacks = {x: jnp.asarray(a, jnp.int8 if int8 else q.dtype) for x, a in stacks.items()}
    if int8:
        scales = random.uniform(0.01, 0.02, (2, 3, 2, 1, 128)).astype(np.float32)
        stacks |= {"k_scale_BKS": scales[0], "v_scale_BKS": scales[1]}
    lengths = jnp.array([[128], [70]], jnp.int32)
    pos = jnp.where(jnp.arange(128) < lengths, jnp.arange(128), -1).astype(jnp.int32)
    lo, hi = causal_interval(lengths - 1)
    mask = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=AttentionSpec(scale=0.01))

    @jax.jit
    def run(caches, layer=None):
        return decode_attention_hopper(
            q, **caches, **mask, layer=layer, splits=2, return_lse=True, interpret=True
        )

    for found, expected in zip(
        run(stacks, jnp.int32(1)), run(jax.tree.map(lambda a: a[1], stacks))
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "heads, most, splits", [(4, 1000, 32), (32, 100, 4), (132, 9, 1), (4, 2, 2)]
)
def test_splits_fill_the_chip(heads, most, splits):
    assert default_splits(heads, most) == splits


def test_decoding_calls_that_are_refused():
    q, k, v = operands(17, 64)
    mask = dict(lo_BT=jnp.zeros((1, 17), jnp.int32), hi_BT=jnp.ones((1, 17), jnp.int32))
    mask |= dict(kv_pos_BS=in_order(1, 64), spec=AttentionSpec(scale=1.0))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    with pytest.raises(NotImplementedError, match="17 new tokens"):
        decode_attention_hopper(q, k, v, **mask)
    with pytest.raises(NotImplementedError, match="int8 with scales"):
        decode_attention_hopper(q[:, :1], k.astype(jnp.int8), v, **mask)
    with pytest.raises(ValueError, match="neither"):
        decode_attention_hopper(q[:, :1], k, v, k_scale_BKS=jnp.ones((1, 1, 64)), **mask)
