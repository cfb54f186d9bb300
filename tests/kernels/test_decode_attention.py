"""One suite over every implementation of decoding attention."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from marks import nightly

from gemma_kernels.attention import AttentionSpec, attention, causal_interval
from gemma_kernels.decode_attention import IMPLEMENTATIONS, decode_attention
from gemma_kernels.decode_attention.cases import CASES, Case
from gemma_kernels.decode_attention.reference import dequantise
from gemma_kernels.decode_attention.tpu import decode_attention_tpu
from gemma_kernels.decode_attention.tpu_blocks import Blocks, default_blocks

# Blocks of the cache, by name; None: as it would.
BLOCKS = {
    "blocks of 128": Blocks(keys=128, items=2),
    "by shape": None,
    "two cores": Blocks(keys=128, items=3, cores=2),
}
FAST = [("xla", None), *(("tpu", blocks) for blocks in BLOCKS)]
FEW = [case for case in CASES if case.name in ("3n, local", "27B, heads of 128", "rows of nothing")]
# Sizes of further models, with no feature that others have not.
REST = [case for case in CASES if case.name in ("12B, local", "three heads of 128", "4B, global")]
BY_DAY = [case for case in CASES if case not in REST]
RING = Case(name="ring", lengths=(1,), S=128, N=2, H=128, window=128)


def operands(case: Case, dtype=jnp.float32, cache_dtype=None):
    keys = jax.random.split(jax.random.key(case.S), 3)
    B = len(case.lengths)
    q = jax.random.normal(keys[0], (B, case.T, case.N, case.H), dtype)
    k, v = (jax.random.normal(key, (B, case.K, case.S, case.H), dtype) for key in keys[1:])
    q_pos, kv_pos = case.positions()
    lo, hi = causal_interval(jnp.asarray(q_pos), case.window)
    mask = dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=jnp.asarray(kv_pos))
    if cache_dtype != jnp.int8:
        return (q, k.astype(cache_dtype or dtype), v.astype(cache_dtype or dtype)), mask
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return (q, k, v), mask | dict(k_scale_BKS=k_scale, v_scale_BKS=v_scale)


def quantise(x):
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


@cache
def program(name, spec, blocks=None, interpret=True, return_lse=False, integers=None):
    """The kernel for TPUs runs in Pallas' interpreter."""

    def step(q, k, v, mask):
        options = dict(spec=spec, return_lse=return_lse)
        if name != "tpu":
            return decode_attention(q, k, v, **mask, **options, implementation=name)
        operands = [mask[name] for name in ("lo_BT", "hi_BT", "kv_pos_BS")]
        scales = {name: mask.get(name) for name in ("k_scale_BKS", "v_scale_BKS", "layer")}
        options |= dict(blocks=BLOCKS.get(blocks, blocks), interpret=interpret, integers=integers)
        options |= scales
        return decode_attention_tpu(q, k, v, *operands, **options)

    # Most of the time here is the compiler's.
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": "0"})


def run(name, case, arrays, mask, blocks=None, **options):
    return program(name, case.spec, blocks, **options)(*arrays, mask)


@cache
def expected(case: Case):
    return run("reference", case, *operands(case), return_lse=True)


def test_reference_by_hand():
    """Scores 0 and ln 3 for two keys in the wrong order, a third that is too old, an empty slot."""
    q = jnp.ones((1, 1, 1, 1))
    k = jnp.array([np.log(3.0), 0.0, 7.0, 9.0]).reshape(1, 1, 4, 1)
    v = jnp.array([8.0, 4.0, 100.0, 1000.0]).reshape(1, 1, 4, 1)
    mask = dict(lo_BT=jnp.array([[4]]), hi_BT=jnp.array([[6]]))
    out, lse = decode_attention(
        q, k, v, **mask, kv_pos_BS=jnp.array([[5, 4, 3, -1]]), spec=AttentionSpec(scale=1.0),
        return_lse=True, implementation="reference",
    )  # fmt: skip
    np.testing.assert_allclose(out.ravel(), [7.0], rtol=1e-6)
    np.testing.assert_allclose(lse.ravel(), [np.log(4.0)], rtol=1e-6)


@pytest.mark.parametrize("name, blocks", FAST[:2])
@pytest.mark.parametrize("case", [*BY_DAY, *nightly(*REST)], ids=lambda case: case.name)
def test_forward(name, blocks, case):
    arrays, mask = operands(case)
    out = run(name, case, arrays, mask, blocks)
    np.testing.assert_allclose(out, expected(case)[0], atol=2e-6)
    np.testing.assert_array_equal(out, run(name, case, arrays, mask, blocks))


@pytest.mark.parametrize("name, blocks", FAST)
@pytest.mark.parametrize("case", [FEW[0], *nightly(*FEW[1:])], ids=lambda case: case.name)
def test_log_sum_exp_and_other_blocks(name, blocks, case):
    out, lse = run(name, case, *operands(case), blocks, return_lse=True)
    np.testing.assert_allclose(out, expected(case)[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected(case)[1], atol=5e-6)


@pytest.mark.parametrize("name, blocks", [("xla", None), ("tpu", "by shape")])
@pytest.mark.parametrize("end", [1, 2, 127, 128, 129, 200, 255, 256, 257])
def test_rings_at_every_phase_are_as_good_as_full_caches(name, blocks, end):
    """A ring of the window's size holds exactly what a query sees."""
    full = replace(RING, name="full", lengths=(end,), S=384)
    (q, k, v), mask = operands(full)
    want = run("reference", full, (q, k, v), mask)
    ring = replace(RING, lengths=(end,))
    _, kv_pos = ring.positions()
    at = np.maximum(kv_pos[0], 0)
    got = run(name, ring, (q, k[:, :, at], v[:, :, at]), mask | {"kv_pos_BS": kv_pos}, blocks)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    "name, cache_dtype, integers, uneven",
    [
        ("xla", jnp.bfloat16, None, False),
        ("xla", jnp.int8, None, True),
        ("tpu", jnp.bfloat16, None, False),
        ("tpu", jnp.int8, False, True),
        ("tpu", jnp.int8, True, False),
        ("tpu", jnp.int8, True, True),
    ],
)
@pytest.mark.parametrize("case", [FEW[0], *nightly(FEW[1])], ids=lambda case: case.name)
def test_bfloat16_errs_no_more_than_plain_code(name, cache_dtype, integers, uneven, case):
    """Error against float32 on the same cache, at most twice that of a plain bfloat16 softmax; also
    where some tokens' values are a thousand times those of others. Products of integers err no more
    than those of widened numbers."""
    (q, k, v), mask = operands(case, jnp.bfloat16, cache_dtype)
    if uneven:
        mask["v_scale_BKS"] *= 10.0 ** jax.random.uniform(jax.random.key(7), (case.S,), maxval=3)
    k_wide, v_wide = (
        dequantise(x, mask.get(scale)) for x, scale in ((k, "k_scale_BKS"), (v, "v_scale_BKS"))
    )
    visible = {key: mask[key] for key in ("lo_BT", "hi_BT", "kv_pos_BS")}
    exact = run("reference", case, (q.astype(jnp.float32), k_wide, v_wide), visible)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, case.N // case.K, axis=1).astype(jnp.bfloat16) for x in (k, v))
        scores = jnp.einsum("BTNH,BNSH->BNTS", q, k) * jnp.bfloat16(case.H**-0.5)
        seen = visible["kv_pos_BS"][:, None] >= visible["lo_BT"][..., None]
        seen &= visible["kv_pos_BS"][:, None] < visible["hi_BT"][..., None]
        weights = jax.nn.softmax(scores, where=seen[:, None], axis=-1)
        return jnp.einsum("BNTS,BNSH->BTNH", weights, v)

    def error(out):
        assert out.dtype == jnp.bfloat16
        return np.abs(np.asarray(out, np.float32) - exact).max()

    def kernel(integers):
        return run(name, case, (q, k, v), mask, dict(FAST[:2])[name], integers=integers)

    assert error(kernel(integers)) <= 2 * error(plain(q, k_wide, v_wide))
    if integers:
        assert error(kernel(True)) <= 1.1 * error(kernel(False))


@pytest.mark.parametrize("name, blocks", FAST[:2])
@pytest.mark.parametrize("cache_dtype", [jnp.bfloat16, jnp.int8])
def test_narrow_caches_of_float32_queries(name, blocks, cache_dtype):
    case = FEW[0]
    arrays, mask = operands(case, cache_dtype=cache_dtype)
    want = run("reference", case, arrays, mask)
    np.testing.assert_allclose(run(name, case, arrays, mask, blocks), want, atol=3e-6)


def test_it_is_attention():
    """The same call by the other entry, over the cache with heads behind."""
    case = next(case for case in CASES if case.T > 1)
    (q, k, v), mask = operands(case)
    k_BSKH, v_BSKH = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    want = attention(q, k_BSKH, v_BSKH, **mask, spec=case.spec, implementation="xla")
    np.testing.assert_allclose(run("xla", case, (q, k, v), mask), want, atol=2e-6)


@pytest.mark.parametrize("blocks", ["blocks of 128", "two cores"])
def test_tpu_kernel_has_no_races(blocks):
    """Under the interpreter that imitates a TPU's memories and copies."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    case = FEW[2]
    out = run("tpu", case, *operands(case), blocks, interpret=params)
    np.testing.assert_allclose(out, expected(case)[0], atol=2e-6)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_tpu_kernel_on_drawn_calls(data):
    """Batches, windows, slots and cuts that nobody thought of."""
    K, groups = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]), "heads")
    S = 128 * data.draw(st.integers(1, 5), "hundreds of slots")
    T = data.draw(st.integers(1, 16), "T")
    window = data.draw(st.none() | st.integers(1, S), "window")
    most = 120_000 if window is not None and T + window - 1 <= S else S
    lengths = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=4), "lengths")
    case = Case(
        name="drawn", lengths=tuple(lengths), T=T, S=S, N=K * groups, K=K, H=128,
        window=window, shuffled=data.draw(st.booleans(), "shuffled"),
    )  # fmt: skip
    keys = data.draw(st.sampled_from([n for n in range(128, S + 1, 128) if S % n == 0]), "keys")
    items, cores = data.draw(st.integers(1, 3), "items"), data.draw(st.integers(1, 2), "cores")
    if keys == S and cores == 1:
        items = 1
    blocks = Blocks(keys=keys, items=items, cores=cores)
    arrays, mask = operands(case)
    want = run("reference", case, arrays, mask)
    np.testing.assert_allclose(run("tpu", case, arrays, mask, blocks), want, atol=2e-6)


def test_blocks_that_nobody_sees_are_not_read():
    """Not-a-number in them would spread."""
    case = Case(name="mostly empty", lengths=(130, 0, 300), S=512, N=2, H=128, window=100)
    (q, k, v), mask = operands(case)
    far = (case.positions()[1] < 0).reshape(3, 4, 128).all(-1).repeat(128, 1)[:, None, :, None]
    k, v = jnp.where(far, jnp.nan, k), jnp.where(far, jnp.nan, v)
    out = run("tpu", case, (q, k, v), mask, "blocks of 128")
    assert np.isfinite(out).all() and np.abs(out).max() > 0


@pytest.mark.parametrize("S", [128, 512, 640, 1024, 4096, 32_768, 131_072])
@pytest.mark.parametrize("K, H", [(1, 256), (2, 256), (4, 256), (8, 256), (16, 128)])
def test_default_blocks_fit_every_model(K, H, S):
    for B in (1, 3, 16, 64):
        for itemsize in (1, 2):
            for cores in (1, 2):
                blocks = default_blocks((B, K, S, H), itemsize, cores)
                assert S % blocks.keys == 0 and blocks.keys % 128 == 0
                assert blocks.items * blocks.rows * blocks.keys * 2 * K * H * itemsize <= 8 * 2**20
                assert blocks.rows == 1 or (S == blocks.keys and B % blocks.rows == 0)
                assert blocks.cores * blocks.items * blocks.rows <= B * S // blocks.keys or (
                    blocks.cores * (blocks.items - 1) < B * S // blocks.keys
                )


def test_what_the_tpu_kernel_cannot_do():
    case = CASES[0]
    (q, k, v), mask = operands(case)
    lo, hi, pos = mask.values()

    def kernel(q, k, v, pos, spec=case.spec, blocks=None):
        return decode_attention_tpu(q, k, v, lo, hi, pos, spec, blocks=blocks, interpret=True)

    with pytest.raises(NotImplementedError, match="a cache of 500 slots; it takes multiples"):
        kernel(q, k[:, :, :500], v[:, :, :500], pos[:, :500])
    with pytest.raises(NotImplementedError, match="heads of width 64"):
        kernel(q[..., :64], k[..., :64], v[..., :64], pos)
    with pytest.raises(NotImplementedError, match="softmax is in float32 only"):
        kernel(q, k, v, pos, replace(case.spec, softmax_in_float32=False))
    with pytest.raises(NotImplementedError, match="queries are float16"):
        kernel(q.astype(jnp.float16), k, v, pos)
    for blocks, message in (
        (Blocks(keys=384), "keys=384 must be a multiple of 128 that divides the cache's 512"),
        (Blocks(keys=128, rows=2), "rows=2 must divide the batch of 2, and be 1"),
        (Blocks(keys=512, items=3), "rows=1 x items=3 must divide the batch of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(q, k, v, pos, blocks=blocks)
    shapes = [(8192, 1, 4, 256), (8192, 1, 512, 256), (8192, 1, 512, 256)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ints = [jax.ShapeDtypeStruct((8192, n), jnp.int32) for n in (1, 1, 512)]
    with pytest.raises(NotImplementedError, match="in VMEM, of .*; split the batch"):
        jax.eval_shape(
            lambda *a: decode_attention_tpu(*a, case.spec, interpret=True), *arrays, *ints
        )


def test_unknown_names_and_misfits_are_refused():
    case = CASES[0]
    (q, k, v), mask = operands(case)

    def step(q, k, v, implementation=None, spec=case.spec, **changes):
        given = mask | changes
        return decode_attention(q, k, v, **given, spec=spec, implementation=implementation)

    for call, message in (
        (lambda: step(q, k, v, "fast"), "unknown decode attention implementation='fast'; choose"),
        (lambda: step(q, k, v[:, :, 1:]), r"v_BKSH has shape .* it needs"),
        (lambda: step(q[0], k, v), "q_BTNH has shape .* four dimensions"),
        (lambda: step(jnp.repeat(q, 17, 1), k, v), r"lo_BT has shape .* it needs \(2, 17\)"),
        (lambda: step(q, k.astype(jnp.int8), v), "int8 caches need k_scale_BKS and v_scale_BKS"),
        (lambda: step(q, k, v, k_scale_BKS=k[..., 0]), "int8 caches need k_scale_BKS"),
        (lambda: step(q, k, v, spec=replace(case.spec, causal=True)), "the mask is lo, hi and"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    lo, hi = (jnp.repeat(mask[name], 17, 1) for name in ("lo_BT", "hi_BT"))
    with pytest.raises(ValueError, match="1 to 16 new tokens, got T=17; more go to attention"):
        step(jnp.repeat(q, 17, 1), k, v, lo_BT=lo, hi_BT=hi)
    with pytest.raises(ValueError, match="query heads N=3 must be a multiple of .* K=2"):
        step(q[:, :, :3], jnp.repeat(k, 2, 1), jnp.repeat(v, 2, 1))


def test_a_named_implementation_never_becomes_another(monkeypatch):
    (q, k, v), mask = operands(CASES[0])

    def cannot(*args, **options):
        raise NotImplementedError("no such hardware")

    with pytest.raises(NotImplementedError, match="needs a TPU; this program is for cpu"):
        decode_attention(q, k, v, **mask, spec=CASES[0].spec, implementation="tpu")
    for name in ("xla", "reference"):
        monkeypatch.setitem(IMPLEMENTATIONS, name, cannot)
    with pytest.raises(NotImplementedError, match="fits: tpu: needs a TPU; .* xla: no such"):
        decode_attention(q, k, v, **mask, spec=CASES[0].spec)


@pytest.mark.parametrize("cache_dtype", [None, jnp.int8])
@pytest.mark.parametrize("name, blocks", [("xla", None), ("tpu", "blocks of 128")])
@pytest.mark.parametrize("case", [FEW[0], *nightly(FEW[1])], ids=lambda case: case.name)
def test_a_layer_of_a_stack(case, name, blocks, cache_dtype):
    """Read where it lies, it gives what it gives alone."""
    (q, k, v), mask = operands(case, cache_dtype=cache_dtype)
    alone = run(name, case, (q, k, v), mask, blocks)
    stacks = [jnp.stack([jnp.flip(x, 2), x, -x]) for x in (k, v)]
    scales = {x: jnp.stack([mask[x] * n for n in (3, 1, 2)]) for x in mask if "scale" in x}
    stacked = run(name, case, (q, *stacks), mask | scales | {"layer": jnp.int32(1)}, blocks)
    np.testing.assert_array_equal(stacked, alone)
    other = run(name, case, (q, *stacks), mask | scales | {"layer": jnp.int32(2)}, blocks)
    assert not np.array_equal(other, alone)
