"""Decoding compiled for real TPUs, with the compiler that comes with libtpu and no TPU."""

import jax
import jax.numpy as jnp
import pytest
from marks import nightly

from gemma_jax import Runtime, forward, preset
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import LayerCache, Slots, extend, init_cache, write_heads
from gemma_jax.decoder.model import abstract_model
from gemma_kernels.attention import AttentionSpec
from gemma_kernels.compilers.tpu_targets import CHIPS, lower
from gemma_kernels.decode_attention import decode_attention

pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")

# name -> B, T, N, K, S, H, dtype of the cache
SHAPES = {
    "4B, global": (1, 1, 8, 4, 32_768, 256, jnp.bfloat16),
    "12B, local": (2, 1, 16, 8, 1024, 256, jnp.bfloat16),
    "1B, drafts": (4, 5, 4, 1, 640, 256, jnp.bfloat16),
    "27B, int8": (2, 1, 32, 16, 4096, 128, jnp.int8),
    "27B, local": (1, 1, 32, 16, 1024, 128, jnp.bfloat16),
    "3n, float32": (2, 16, 8, 2, 512, 256, jnp.float32),
}
ALL = [
    *((chip, "4B, global") for chip in CHIPS),
    *(("v5e", name) for name in SHAPES if name != "4B, global"),
]
BY_DAY = [("v5e", "4B, global"), ("v5e", "1B, drafts"), ("v5e", "27B, int8")]


def operands(B, T, N, K, S, H, dtype):
    shapes = [(B, T, N, H), (B, K, S, H), (B, K, S, H), (B, T), (B, T), (B, S)]
    dtypes = [jnp.float32 if dtype == jnp.float32 else jnp.bfloat16, dtype, dtype] + [jnp.int32] * 3
    if dtype == jnp.int8:
        shapes, dtypes = shapes + [(B, K, S)] * 2, dtypes + [jnp.float32] * 2
    return [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes)]


def step(q, k, v, lo, hi, pos, k_scale=None, v_scale=None):
    spec = AttentionSpec(scale=q.shape[3] ** -0.5)
    return decode_attention(
        q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec,
        k_scale_BKS=k_scale, v_scale_BKS=v_scale, implementation="tpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "chip, name", [*BY_DAY, *nightly(*(pair for pair in ALL if pair not in BY_DAY))]
)
def test_compiles_and_copies_no_cache(chip, name):
    B, *_, K, S, H, dtype = SHAPES[name]
    lowered = lower(step, chip, *operands(*SHAPES[name]))
    assert "tpu_custom_call" in lowered.as_text()
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    # Queries, intervals and results in tiles, positions: far less than keys or values.
    assert temporary < B * K * S * H * jnp.dtype(dtype).itemsize / 2


@pytest.mark.parametrize("chip, name", [("v6e", "1B, drafts"), *nightly(("v5e", "4B, global"))])
def test_a_loop_writes_into_its_cache_and_copies_none(chip, name):
    """The program of a whole decoding loop has no temporary of the size of a cache."""
    B, T, _, K, S, H, _ = SHAPES[name]
    q, k, v, *_, pos = operands(*SHAPES[name])

    def loop(k, v, pos, q, new, steps):
        def body(state):
            i, k, v, pos, q = state
            at = i + jnp.broadcast_to(jnp.arange(T), (B, T))
            pos = pos.at[jnp.arange(B)[:, None], at % S].set(at)
            kv, _ = extend(LayerCache(k, v), new, new, Slots(at % S, None, pos), write_heads)
            k, v = kv.k_BKSH, kv.v_BKSH
            return i + T, k, v, pos, step(q, k, v, jnp.maximum(at - 511, 0), at + 1, pos)

        return jax.lax.while_loop(lambda state: state[0] < steps, body, (0, k, v, pos, q))

    new = jax.ShapeDtypeStruct((B, K, T, H), k.dtype)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    memory = lower(loop, chip, k, v, pos, q, new, steps).compile().memory_analysis()
    assert memory.temp_size_in_bytes < B * K * S * H * k.dtype.itemsize / 2


@pytest.mark.parametrize("tokens, has_kernel", [(5, True), (64, False)])
def test_models_decode_on_it(tokens, has_kernel):
    runtime = Runtime(dtype=jnp.dtype("bfloat16"))
    model = abstract_model(preset("gemma3-1b"), runtime=runtime)
    cache = jax.eval_shape(
        lambda: init_cache(model.cfg, model.layer_groups, 1, 2048, "bfloat16", slack=4)
    )
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def run(model, cache, ids):
        positions = cache.length_B[:, None] + jnp.arange(tokens)
        out = forward(model, Batch(ids, positions), cache=cache, logits="last")
        return out.logits, out.cache

    text = lower(run, "v5e", model, cache, ids).as_text()
    assert ("decode_attention" in text) == has_kernel
