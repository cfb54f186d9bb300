"""Matrices in float16 around activations that float16 cannot hold."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import gemma_jax as gj
from gemma_jax.numerics import resolve_numerics
from gemma_jax.runtime import Runtime
from gemma_jax.training.objectives import next_token
from gemma_jax.training.optimizers import OptimizerSettings, make_optimizer
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable
from gemma_jax.weights.float16 import LARGEST, Float16Product, with_float16_products
from gemma_jax.weights.tree import flat_params, map_params, with_attributes

CFG = tiny.gemma3(layers=2)
TOKENS = tiny.tokens(CFG, 2, 12)
RUNTIMES = {
    "float32": Runtime(),
    "float16": Runtime(numerics=resolve_numerics("float16")),
    "plain": Runtime(dtype=jnp.dtype("float16")),
}


@pytest.fixture(scope="module")
def loud():
    """A model whose norms write numbers into the stream that float16 does not have, as Gemma's."""
    model = tiny.model(CFG, "scan")
    scale = lambda param: param.get_value() * 1e5 + 3e4  # noqa: E731
    return map_params(model, scale, lambda path, param: "post_attn_norm" in path)


def computed(model, name):
    return with_attributes(model, runtime=RUNTIMES[name])


def train(model, steps=6):
    settings = OptimizerSettings(name="adamw", rate=3e-3, clip=1.0)
    trained, frozen, join = trainable(model)
    init, step = make_step(next_token, make_optimizer(settings, model, steps), join)
    state, step, said = init(trained, jax.random.key(0)), jax.jit(step), []
    for _ in range(steps):
        state, metrics = step(state, frozen, TOKENS)
        said.append(metrics)
    return said


def test_activations_are_beyond_float16(loud):
    stream = gj.forward(loud, TOKENS, capture="layer_outputs").captured["layer_outputs"]
    assert np.abs(stream).max() > 1.3 * LARGEST


def test_a_loud_model_trains_as_in_float32(loud):
    exact, ours = (train(computed(loud, name)) for name in ("float32", "float16"))
    assert all(metrics["finite"] for metrics in ours)
    losses, expected = ([float(m["loss"]) for m in said] for said in (ours, exact))
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_allclose(losses, expected, rtol=3e-3)
    assert losses != expected  # it did compute in float16
    norms = [[float(m["grad_norm"]) for m in said] for said in (ours, exact)]
    np.testing.assert_allclose(*norms, rtol=2e-2)


def test_plain_float16_gives_nan(loud):
    plain = jax.tree.map(lambda a: a.astype(jnp.float16), loud)
    assert np.isnan(gj.loss(computed(plain, "plain"), TOKENS))


def test_gradients_are_those_of_float32_within_roundings(loud):
    exact, ours = (
        trainable(jax.jit(jax.grad(gj.loss))(computed(loud, name), TOKENS)).trained
        for name in ("float32", "float16")
    )
    for path, theirs in exact.items():
        error = optax.tree.norm(ours[path] - theirs) / optax.tree.norm(theirs)
        assert error < 1e-2, (path, error)


def test_products_are_of_float16_with_sums_in_float32():
    """Sums beyond float16's range are kept, what enters beyond it is clamped."""
    w = jnp.full((4, 64), 300.0)
    y = Float16Product(w).contract("BD,FD->BF", jnp.full((1, 64), 200.0))
    np.testing.assert_allclose(y, 64 * 300.0 * 200.0)
    clamped = Float16Product(w[:, :1]).contract("BD,FD->BF", jnp.full((1, 1), 1e6))
    np.testing.assert_allclose(clamped, LARGEST * 300.0)
    text = str(
        jax.make_jaxpr(lambda x: Float16Product(w).contract("BD,FD->BF", x))(jnp.ones((1, 64)))
    )
    assert "f16[4,64]" in text and "preferred_element_type=float32" in text


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_gradients_of_any_size_are_as_exact_as_float16_is(size):
    """Far below and above what float16 holds: no scale of the loss is needed."""
    random = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((3, 8), (5, 8), (3, 5))
    )
    product = lambda x, w: Float16Product(w).contract("BD,FD->BF", x)  # noqa: E731
    _, backward = jax.vjp(product, x, w)
    for ours, exact in zip(backward(size * dy), (dy @ w, dy.T @ x), strict=True):
        np.testing.assert_allclose(ours / size, exact, rtol=5e-3, atol=5e-3)


def test_gradients_that_are_not_finite_stay_so():
    _, backward = jax.vjp(
        lambda x: Float16Product(jnp.ones((5, 8))).contract("BD,FD->BF", x), jnp.ones((3, 8))
    )
    assert not np.isfinite(backward(jnp.full((3, 5), jnp.inf))[0]).any()
    assert np.array_equal(backward(jnp.zeros((3, 5)))[0], np.zeros((3, 8)))


def test_matrices_of_layers_alone_are_narrow():
    model = with_float16_products(tiny.model(tiny.gemma3n()))
    narrow = {
        ".".join(p for p in path if isinstance(p, str))
        for path, param in flat_params(model).items()
        if isinstance(param.get_value(), Float16Product)
    }
    attn, ffn = "qkvo", ("gate", "up", "down")
    assert narrow == {f"blocks.attn.{n}.w" for n in attn} | {f"blocks.ffn.{n}.w" for n in ffn}


def test_loading_in_float16():
    model, tok = gj.load("checkpoints/digits", modalities=("text",), dtype="float16")
    assert model.runtime.dtype == jnp.float32 and model.runtime.numerics.float16_matrices
    assert model.embed.table.get_value().dtype == jnp.float16
    tokens = np.array([tok.encode("Which digit is left?", bos=True)])
    exact = gj.load_model("checkpoints/digits", modalities=("text",))
    logits = gj.forward(model, tokens).logits
    np.testing.assert_allclose(logits, gj.forward(exact, tokens).logits, atol=0.05)
    with pytest.raises(ValueError, match="vision_dtype='float16' overflows: give float32"):
        gj.load_model("checkpoints/digits", vision_dtype="float16")


def test_other_cells_are_what_they_were():
    for name in ("hf", "gdm"):
        assert not resolve_numerics(name).float16_matrices
    assert resolve_numerics("float16") == replace(resolve_numerics("hf"), float16_matrices=True)
