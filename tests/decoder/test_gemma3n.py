"""Gemma 3n beyond transformers' numbers: named numerics, the backward pass, caches."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax import forward, init_cache
from gemma_jax.decoder.cache import cache_bytes
from gemma_jax.numerics import NUMERICS
from gemma_jax.training.trainable import trainable
from gemma_jax.weights.tree import with_attributes

CFG = tiny.gemma3n(4, 1)


def with_runtime(model, **changes):
    return with_attributes(model, runtime=replace(model.runtime, **changes))


def gradients(model, tokens):
    trained, frozen, join = trainable(model)

    def loss(trained):
        logits = forward(join(trained, frozen), tokens).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    step = jax.jit(jax.grad(loss)).lower(trained).compile()
    return step(trained), step.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("layout, layers", [("unrolled", (4, 1)), *nightly(("scan", (9, 3)))])
def test_rematerialised_gradients_are_the_same(layout, layers):
    """Lent keys and values cross the layers that are computed twice; less is kept meanwhile."""
    model, tokens = tiny.model(tiny.gemma3n(*layers), layout), tiny.tokens(CFG, 4, 64)
    (plain, much), (again, less) = (
        gradients(with_runtime(model, remat=remat), tokens) for remat in (False, True)
    )
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    chex.assert_trees_all_close(plain, again, atol=2e-5 * largest)
    # Without a loop to keep them apart, XLA's CPU backend makes one computation of the two.
    assert less < (0.8 if layout == "scan" else 1.1) * much


def test_gdm_has_no_final_cap_for_gemma_3n():
    """Same argmax, other log-probabilities: the one difference that is not rounding."""
    model, tokens = tiny.model(CFG), tiny.tokens(CFG, 2, 9)
    hf, gdm = (forward(with_runtime(model, numerics=NUMERICS[n]), tokens).logits for n in NUMERICS)
    np.testing.assert_allclose(3 * np.tanh(gdm / 3), hf, atol=1e-4)
    assert np.abs(gdm - hf).max() > 0.01


def test_the_cap_does_not_depend_on_other_parts():
    """An experiment without AltUp keeps the cap of its config, under either numerics."""
    without = replace(CFG, altup=None, optional_final_cap=False)
    for name in NUMERICS:
        assert tiny.model(without, numerics=NUMERICS[name]).soft_cap == CFG.final_soft_cap
    gdm = tiny.model(replace(CFG, altup=None), numerics=NUMERICS["gdm"])
    assert gdm.soft_cap is None, "left out because the config calls it optional, not for AltUp"


def test_gdm_clips_altup_in_every_pass():
    clipped = replace(CFG, altup=replace(CFG.altup, coef_clip=0.01))
    model, tokens = tiny.model(clipped), tiny.tokens(CFG, 1, 5)
    free = tiny.model(CFG)
    hf, gdm = ({"numerics": NUMERICS[name]} for name in ("hf", "gdm"))
    chex.assert_trees_all_equal(
        forward(with_runtime(model, **hf), tokens).logits,
        forward(with_runtime(free, **hf), tokens).logits,
    )
    moved = forward(with_runtime(model, **gdm), tokens).logits
    assert np.abs(moved - forward(with_runtime(free, **gdm), tokens).logits).max() > 1e-3


def test_ids_beyond_the_per_layer_table_read_its_first_row():
    model = tiny.model(CFG)  # 96 tokens, 90 rows
    table = model.per_layer.table[...]
    beyond, padding = np.array([[90, 95]]), np.array([[0, 0]])
    chex.assert_trees_all_equal(
        model.per_layer.lookup(beyond, jnp.float32), model.per_layer.lookup(padding, jnp.float32)
    )
    assert model.per_layer.lookup(np.array([[89]]), jnp.float32)[0, 0, 0, 0] == pytest.approx(
        float(table[89, 0, 0]) * CFG.per_layer.width**0.5
    )


def test_only_owners_have_a_cache():
    """E4B at 32K: 20 layers of 35, 16 of them as long as the window."""
    cfg = gj.preset("gemma3n-e4b")
    slot = 2 * 2 * 256 * 2  # keys and values, heads, width, bytes
    assert cache_bytes(cfg, 1, 32_768, "bfloat16") == slot * (16 * 512 + 4 * 32_768) == 285_212_672
    assert 285_212_672 < 0.13 * slot * 35 * 32_768
    layer_groups = gj.nn.layer_groups.group_layers(cfg.layers)
    cache = jax.eval_shape(lambda: init_cache(cfg, layer_groups, 1, 32_768, "bfloat16"))
    kv = [leaf for layers in cache.layers for leaf in jax.tree.leaves(layers)]
    assert sum(leaf.size * 2 for leaf in kv) == 285_212_672
