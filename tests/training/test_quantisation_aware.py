"""Rounding in training is that of files and of `quantise`; gradients pass it; files hold it."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import gemma_checkpoints as gc
import gemma_jax as gj
from gemma_jax.experiments.elastic.quantise import RULES
from gemma_jax.training.quantisation_aware import FORMS
from gemma_jax.weights.protocol import dense
from gemma_jax.weights.tree import flat_params

FFN = {"*.ffn.up.w": "int4:32", "*.ffn.gate.w": "int4:32"}


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.gemma3(layers=1, d_model=32))


def rows(seed=0):
    """Ordinary rows, ties, one-sided blocks, zeros, and values far from and next to 0."""
    w_OI = np.random.default_rng(seed).normal(size=(64, 128)).astype(np.float32)
    w_OI[0] = np.arange(-64, 64)
    w_OI[1, :32], w_OI[2, 32:64], w_OI[3] = 0, np.abs(w_OI[2, 32:64]), w_OI[3] * 1e-6
    w_OI[4, ::32] = 1000
    return w_OI


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_blocks_are_those_of_the_gguf_package(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    theirs = gguf.dequantize(gguf.quantize(rows(), kind), kind)
    for round_rows in (FORMS[name], jax.jit(FORMS[name])):
        np.testing.assert_array_equal(round_rows(jnp.asarray(rows())), theirs)


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "int4:32", "int8", "bfloat16"])
def test_rounding_what_is_rounded_changes_nothing(name):
    once = jax.jit(FORMS[name])(jnp.asarray(rows())).astype(jnp.float32)
    twice = jax.jit(FORMS[name])(once).astype(jnp.float32)
    if name in ("q4_0", "q8_0", "bfloat16"):
        np.testing.assert_array_equal(once, twice)
    else:  # the largest of a group is half a step beyond the last code, so scales shrink
        np.testing.assert_allclose(once, twice, atol=float(np.abs(rows()).max()) / 15)


@pytest.mark.parametrize("storage", ["int4:32", "int8", "int8:32"])
def test_it_computes_what_a_quantised_model_computes(model, storage):
    rules = {"*.ffn.up.w": storage, "*.attn.q.w": storage}
    rounded, stored = gj.fake_quantise(model, rules), gj.quantise(model, rules)
    theirs = {path: param.get_value() for path, param in flat_params(stored).items()}
    for path, param in flat_params(rounded).items():
        np.testing.assert_array_equal(param.get_value(), dense(theirs[path]), err_msg=str(path))


def test_gradients_are_those_at_the_rounded_weights(model):
    tokens_BT = tiny.tokens(model.cfg, 2, 8)
    trained, frozen, join = gj.trainable(model)
    rounded = gj.trainable(gj.fake_quantise(model, FFN)).trained
    assert any((rounded[path] != trained[path]).any() for path in trained)

    def loss(objective):
        return jax.jit(jax.grad(lambda trained: objective(join(trained, frozen), tokens_BT)[0]))

    through = loss(gj.quantisation_aware(gj.next_token, FFN))(trained)
    there = loss(gj.next_token)(rounded)
    for path in trained:
        np.testing.assert_allclose(through[path], there[path], atol=1e-6, err_msg=str(path))


def test_steps_lower_the_loss_of_the_rounded_model(model):
    tokens_BT = tiny.tokens(model.cfg, 2, 16)
    trained, frozen, join = gj.trainable(model)
    rules = {"*.ffn.[ug]*.w": "q4_0", "*.attn.[qkv].w": "q4_0"}
    objective = gj.quantisation_aware(gj.next_token, rules)
    init, step = gj.make_step(objective, optax.adam(3e-3), join)
    state, step = init(trained, jax.random.key(0)), jax.jit(step)
    before = objective(model, tokens_BT)[0]
    for _ in range(12):
        state, _ = step(state, frozen, tokens_BT)
    assert objective(join(state.trained, frozen), tokens_BT)[0] < before - 0.5


def test_a_gguf_file_holds_what_was_trained_bit_for_bit(tmp_path):
    model = gj.load_model("checkpoints/elastic", dtype="float32", layout="unrolled")
    rounded = gj.fake_quantise(model, RULES)
    path = gc.save_gguf(rounded, tmp_path / "e.gguf", "q4_0", source="checkpoints/elastic")
    back = gj.load_model(str(path), dtype="float32", layout="unrolled")
    theirs = {path: param.get_value() for path, param in flat_params(back).items()}
    moved = 0
    for path, param in flat_params(rounded).items():
        np.testing.assert_array_equal(param.get_value(), theirs[path], err_msg=str(path))
        moved += (param.get_value() != flat_params(model)[path].get_value()).any()
    assert moved > 40


def test_unknown_rules_and_rounded_models_are_refused(model):
    with pytest.raises(ValueError, match="storage='q3_0' must be 'float32'.* or 'q8_0'"):
        gj.fake_quantise(model, {"*.ffn.*": "q3_0"})
    with pytest.raises(ValueError, match="stored narrower already: load the model in floats"):
        gj.fake_quantise(gj.quantise(model, FFN), FFN)
    with pytest.raises(ValueError, match="decides on no matrix"):
        gj.fake_quantise(model, {"nothing.*": "q4_0"})
