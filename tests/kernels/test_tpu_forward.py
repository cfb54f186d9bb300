"""What the forward kernel for TPUs does beyond the common suite, in Pallas' interpreter."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from marks import nightly

from gemma_kernels.attention import AttentionSpec
from gemma_kernels.attention.mask import causal_rows, visible
from gemma_kernels.attention.reference import attention_reference
from gemma_kernels.attention.tpu.attention import Blocks, attention_tpu, default_blocks

SMALL = Blocks(q=128, k=128, piece=128, fetch=2)
CAUSAL = AttentionSpec(scale=0.3, causal=True)


def draw(B, T, S, N, K, H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(T + S), 3)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes))


def kernel(*qkv, spec, mask=(None, None, None), blocks=SMALL, **options):
    return attention_tpu(*qkv, *mask, spec, blocks=blocks, interpret=True, **options)


def by_definition(*qkv, spec, **options):
    (B, T), S = qkv[0].shape[:2], qkv[1].shape[1]
    mask = causal_rows(B, T, S, spec.window)
    return attention_reference(*qkv, *mask, replace(spec, causal=False, window=None), **options)


@pytest.mark.parametrize(
    "T, S, window, blocks",
    [
        (130, 500, 100, SMALL),  # the first tile already has its window
        (389, 389, None, replace(SMALL, q=256)),
        *nightly(
            (389, 389, 64, replace(SMALL, q=256)),  # a prime; several pieces to a tile
            (300, 300, 260, SMALL),  # window and tile cover the text
            (1, 300, None, SMALL),
            (1, 1, 1, SMALL),
        ),
    ],
)
def test_causal_mask_without_operands(T, S, window, blocks):
    qkv, spec = draw(1, T, S, 4, 2, 16), replace(CAUSAL, window=window)
    run = jax.jit(partial(kernel, spec=spec, blocks=blocks, return_lse=True))
    for ours, theirs in zip(run(*qkv), by_definition(*qkv, spec=spec, return_lse=True)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_log_sum_exp_has_gradients():
    qkv, spec = draw(1, 150, 150, 4, 2, 16), replace(CAUSAL, window=40, soft_cap=3.0)

    def loss(function, qkv):
        out, lse = function(*qkv, spec=spec, return_lse=True)
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in (out, lse))

    ours, theirs = (
        jax.jit(jax.grad(partial(loss, function)))(qkv) for function in (kernel, by_definition)
    )
    for x, y in zip(ours, theirs):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_rows_that_see_nothing():
    """Zeros and -inf, whether the tile is dead, padded, or full of such rows beside others."""
    qkv = draw(2, 140, 140, 2, 1, 16)
    lo = jnp.zeros((2, 140), jnp.int32)
    hi = jnp.where(jnp.arange(140) % 3 == 0, 0, 140)[None] * jnp.array([[1], [0]])
    mask = lo, hi.astype(jnp.int32), jnp.broadcast_to(jnp.arange(140, dtype=jnp.int32), (2, 140))
    spec = AttentionSpec(scale=0.3)
    out, lse = jax.jit(partial(kernel, spec=spec, mask=mask, return_lse=True))(*qkv)
    blind = np.asarray(hi == 0)
    assert not np.asarray(out)[blind].any()
    assert np.isneginf(np.asarray(lse)[blind]).all() and np.isfinite(np.asarray(lse)[~blind]).all()


def test_bfloat16_errs_no_more_than_plain_code():
    qkv = draw(1, 300, 300, 4, 2, 128, jnp.bfloat16)
    for window in (None, 100):
        spec = AttentionSpec(scale=128**-0.5, causal=True, window=window)
        exact = by_definition(*(x.astype(jnp.float32) for x in qkv), spec=spec)
        seen = visible(*causal_rows(1, 300, 300, window))[0]
        k, v = (jnp.repeat(x, 2, axis=2) for x in qkv[1:])
        scores = jnp.einsum("BTNH,BSNH->BNTS", qkv[0], k).astype(jnp.float32) * spec.scale
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30)).astype(jnp.bfloat16)
        plain = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
        ours = jax.jit(partial(kernel, spec=spec))(*qkv)
        error, allowed = (np.abs(x.astype(jnp.float32) - exact).max() for x in (ours, plain))
        assert error <= 2 * allowed


def test_under_vmap_scan_and_remat():
    spec = replace(CAUSAL, window=40)
    qkv = tuple(x[:, None] for x in draw(2, 140, 140, 2, 1, 16))  # two calls of one row
    expected = by_definition(*(x[:, 0] for x in qkv), spec=spec)
    mapped = jax.jit(jax.vmap(partial(kernel, spec=spec)))(*qkv)
    np.testing.assert_allclose(mapped[:, 0], expected, atol=2e-6)

    def layers(q, k, v):
        layer = jax.checkpoint(lambda q: kernel(q, k, v, spec=spec))
        return jnp.sum(jax.lax.scan(lambda q, _: (layer(q), None), q, length=2)[0])

    def twice(q, k, v):
        return jnp.sum(by_definition(by_definition(q, k, v, spec=spec), k, v, spec=spec))

    one = tuple(x[0] for x in qkv)
    ours, theirs = (jax.jit(jax.grad(function))(*one) for function in (layers, twice))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("window", [40, *nightly(None)])
def test_inside_shard_map(window):
    """Batch and heads over eight devices, each with tiles and bounds of its own."""
    mesh = jax.make_mesh((2, 4), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, rows = PartitionSpec("b", None, "h"), PartitionSpec("b")
    qkv, spec = draw(2, 140, 140, 8, 4, 16), AttentionSpec(scale=0.3, window=window)
    mask = causal_rows(2, 140, 140, window)
    sharded = jax.shard_map(
        lambda q, k, v, *mask: kernel(q, k, v, spec=spec, mask=mask),
        mesh=mesh, in_specs=(heads,) * 3 + (rows,) * 3, out_specs=heads, check_vma=False,
    )  # fmt: skip
    ours = jax.jit(sharded)(*qkv, *mask)
    np.testing.assert_allclose(ours, by_definition(*qkv, spec=spec), atol=2e-6)


def test_gradients_under_vmap_and_inside_shard_map():
    qkv, spec = draw(2, 140, 140, 4, 2, 16), replace(CAUSAL, window=40)

    def gradients(function):
        return jax.jit(jax.grad(lambda qkv: jnp.sum(jnp.sin(function(*qkv))), 0))(qkv)

    def mapped(*qkv):
        call = jax.vmap(partial(kernel, spec=spec))
        return call(*(x[:, None] for x in qkv))[:, 0]

    mesh = jax.make_mesh(
        (2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    heads = PartitionSpec("b", None, "h")
    sharded = jax.shard_map(
        partial(kernel, spec=spec),
        mesh=mesh, in_specs=(heads,) * 3, out_specs=heads, check_vma=False,
    )  # fmt: skip
    expected = gradients(partial(by_definition, spec=spec))
    for function in (mapped, sharded):
        for ours, theirs in zip(gradients(function), expected):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_calls_that_it_does_not_serve():
    qkv = draw(1, 8, 8, 2, 1, 16, jnp.float16)
    with pytest.raises(NotImplementedError, match="float16; it takes bfloat16 and float32"):
        kernel(*qkv, spec=CAUSAL)
    wide = [jax.ShapeDtypeStruct((1, 8, 1, 2**17), jnp.float32)] * 3
    with pytest.raises(NotImplementedError, match="heads of 131072 do not fit VMEM"):
        jax.eval_shape(partial(kernel, spec=CAUSAL, blocks=None), *wide)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("N, K, H", [(4, 1, 256), (16, 8, 256), (32, 16, 128), (32, 1, 512)])
def test_default_tiles_fit(N, K, H, dtype):
    for T, window in ((1, None), (130, 100), (8192, None), (8192, 4096)):
        q, k = (jax.ShapeDtypeStruct((1, T, heads, H), dtype) for heads in (N, K))
        spec = AttentionSpec(scale=1.0, causal=True, window=window)
        blocks = default_blocks(q.shape, k.shape, spec, dtype)
        assert blocks.q <= T + 127 and blocks.q % blocks.piece == 0
        assert jax.eval_shape(partial(kernel, spec=spec, blocks=None), q, k, k).shape == q.shape
