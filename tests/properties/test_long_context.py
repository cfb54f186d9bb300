"""Long prompts: RoPE far out, and memory that does not grow with the square of the length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_jax import forward, init_cache, preset
from gemma_jax.decoder.batch import Batch
from gemma_jax.nn.rope import rope_table
from gemma_jax.numerics import NUMERICS

RUN_LONG = True  # programs of this module: see compile_effort
POSITIONS = np.array([[0, 1, 511, 1_024, 32_767, 65_536, 100_003, 131_071, 131_072]], np.int32)


@pytest.mark.parametrize("theta, factor", [(1e6, 8.0), (1e6, 1.0), (1e4, 1.0)])
def test_angles_up_to_131072(theta, factor):
    """Against the formula in float32 as transformers rounds it: inverse frequency first."""
    exponent = np.arange(0, 256, 2, dtype=np.float32) / np.float32(256)
    inverse = np.float32(1) / np.float32(theta) ** exponent / np.float32(factor)
    angle = (POSITIONS[..., None].astype(np.float32) * inverse).astype(np.float64)
    cos, sin = rope_table(jnp.asarray(POSITIONS), 256, theta, factor, NUMERICS["hf"])
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-7)


def test_both_numerics_stay_near_the_exact_angle():
    """One rounding of the angle is 0.004 rad at these positions; both keep to a few of them."""
    exact = POSITIONS[..., None] * 1e6 ** (-np.arange(0, 256, 2) / 256.0) / 8.0
    for numerics in NUMERICS.values():
        cos, _ = rope_table(jnp.asarray(POSITIONS), 256, 1e6, 8.0, numerics)
        np.testing.assert_allclose(cos, np.cos(exact), atol=3e-3)


def test_far_positions_attend_like_near_ones():
    """RoPE is relative: the same tokens 131,000 places further on give the same logits, but for
    the rounding of their angles."""
    model = tiny.model(tiny.gemma3())
    ids = tiny.tokens(model.cfg, 1, 30)
    near = np.arange(30, dtype=np.int32)[None]
    far = near + 131_000
    np.testing.assert_allclose(
        forward(model, Batch(ids, far)).logits, forward(model, Batch(ids, near)).logits, atol=0.05
    )


def wide_4b(layers=3):
    """The attention of Gemma 3 4B - heads, window, RoPE - with a narrow rest, so that a CPU does
    32K tokens in a test's time."""
    cfg = preset("gemma3-4b")
    return tiny.gemma3(
        layers=layers,
        window=cfg.layers[0].window,
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        max_positions=cfg.max_positions,
    )


def test_32k_tokens_by_chunks_need_little_memory():
    """A dense mask of one chunk of 1,024 against 32,768 keys and 8 heads would be 1 GB of scores;
    for the whole prompt it would be 34 GB."""
    model = jax.eval_shape(lambda: tiny.model(wide_4b()))
    cache = jax.eval_shape(
        lambda: init_cache(model.cfg, model.layer_groups, 1, 32_768, jnp.float32)
    )
    ids = jax.ShapeDtypeStruct((1, 1_024), jnp.int32)
    step = jax.jit(lambda n, i, c: forward(n, i, cache=c, logits="last"), donate_argnums=2)
    used = step.lower(model, ids, cache).compile().memory_analysis()
    keys_and_values = 2 * 32_768 * 4 * 256 * 4  # one global layer, float32
    assert used.temp_size_in_bytes < 2 * keys_and_values


@pytest.mark.nightly
def test_32k_tokens_by_chunks():
    """A local and a global layer read 32,768 tokens; how the last ones arrive changes nothing."""
    cfg = wide_4b()
    cfg = dataclasses.replace(cfg, layers=cfg.layers[1:])
    assert [spec.kind for spec in cfg.layers] == ["local", "global"]
    model = tiny.model(cfg)
    ids = tiny.tokens(cfg, 1, 32_768)
    cache = init_cache(cfg, model.layer_groups, 1, 32_768, jnp.float32)
    for start in range(0, 31 * 1_024, 1_024):
        cache = forward(model, ids[:, start : start + 1_024], cache=cache, logits="none").cache
    whole = forward(model, ids[:, -1_024:], cache=cache, logits="last").logits
    for part in (slice(-1_024, -1), slice(-1, None)):
        out = forward(model, ids[:, part], cache=cache, logits="last")
        cache = out.cache
    assert int(cache.length_B[0]) == 32_768
    np.testing.assert_allclose(out.logits, whole, atol=2e-5)
