"""The loss of a model against its own logits; what counts and what does not; memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax.multimodal.placeholders import soft_tokens
from gemma_jax.numerics import NUMERICS
from gemma_jax.quantisation import quantise
from gemma_jax.training.trainable import trainable
from gemma_kernels.cross_entropy import xla


def plain(model, tokens, *, weights=None, **inputs):
    """The mean over tokens as it reads in a textbook."""
    logits = gj.forward(model, gj.Batch(tokens, **inputs)).logits[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    weights = jnp.ones(tokens.shape) if weights is None else weights
    return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights[:, 1:])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Else these vocabularies would be one chunk."""
    monkeypatch.setattr(xla, "SMALLEST_CHUNK", 32)
    monkeypatch.setattr(xla, "CPU_TILE_BYTES", 1)


@pytest.mark.parametrize("family", ["gemma2", "gemma3n", *nightly("gemma", "gemma3")])
def test_values(family):
    cfg = tiny.FAMILIES[family]()
    model, tokens = tiny.model(cfg), tiny.tokens(cfg, 2, 11)
    np.testing.assert_allclose(gj.loss(model, tokens), plain(model, tokens), rtol=1e-5)


def test_gradients():
    """With a soft cap, and a table that is read and written at both ends of the model."""
    cfg = tiny.gemma2()
    trained, frozen, join = trainable(tiny.model(cfg))
    tokens = tiny.tokens(cfg, 2, 11)
    ours, theirs = (
        jax.jit(jax.grad(lambda trained, f=f: f(join(trained, frozen), tokens)))(trained)
        for f in (gj.loss, plain)
    )
    for path, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[path], atol=2e-5, err_msg=str(path))


def test_both_numerics_of_the_soft_cap():
    """google-deepmind/gemma does not cap the logits of Gemma 3n."""
    cfg = tiny.gemma3n(layers=6, num_shared=0)
    tokens = tiny.tokens(cfg, 1, 9)
    losses = {}
    for numerics in ("hf", "gdm"):
        model = tiny.model(cfg, numerics=NUMERICS[numerics])
        losses[numerics] = float(gj.loss(model, tokens))
        np.testing.assert_allclose(losses[numerics], plain(model, tokens), rtol=1e-5)
    assert abs(losses["hf"] - losses["gdm"]) > 1e-3


def test_what_counts():
    """Padding on either side, a second text in a row, and weights, against losses one by one."""
    cfg = tiny.gemma3(2, every=2)
    model, tokens = tiny.model(cfg), tiny.tokens(cfg, 1, 8)
    alone = plain(model, tokens)
    for left, right in ((0, 3), (3, 0)):
        padded = np.pad(tokens, ((0, 0), (left, right)))
        positions = np.pad(np.arange(8)[None], ((0, 0), (left, right)), constant_values=-1)
        np.testing.assert_allclose(gj.loss(model, gj.Batch(padded, positions)), alone, rtol=1e-5)
    weights = np.array([[9, 0, 1, 0, 0.5, 0, 1, 2]], np.float32)  # of the first token: never said
    expected = plain(model, tokens, weights=weights)
    np.testing.assert_allclose(gj.loss(model, tokens, weights_BT=weights), expected, rtol=1e-5)
    targets = np.full_like(tokens, -1)
    targets[0, 3] = tokens[0, 4]
    expected = plain(model, tokens, weights=(np.arange(8) == 4)[None])
    np.testing.assert_allclose(gj.loss(model, tokens, targets_BT=targets), expected, rtol=1e-5)
    gradient = jax.grad(lambda w: gj.loss(model, tokens, weights_BT=w * weights))(0.0)
    assert gj.loss(model, tokens, weights_BT=0 * weights) == 0 and np.isfinite(gradient)


def test_images_are_not_to_be_said():
    cfg = tiny.gemma3(2, every=2, vision=tiny.vision())
    model, tokens = tiny.model(cfg), tiny.tokens(cfg, 1, 9)
    tokens[0, 2:8] = [91, *[cfg.vision.image_token] * 4, 92]
    soft = soft_tokens(model, tokens, np.ones((1, 3, 56, 56), np.float32))
    weights = (tokens != cfg.vision.image_token).astype(np.float32)
    expected = plain(model, tokens, soft=soft, weights=weights)
    np.testing.assert_allclose(gj.loss(model, gj.Batch(tokens, soft=soft)), expected, rtol=1e-5)


@pytest.mark.parametrize("storage", ["int8", *nightly("bfloat16")])
def test_stored_weights(storage):
    """Of a table stored narrow: what its own logits say."""
    cfg = tiny.gemma2()
    model, tokens = quantise(tiny.model(cfg), storage), tiny.tokens(cfg, 2, 9)
    np.testing.assert_allclose(gj.loss(model, tokens), plain(model, tokens), rtol=1e-5)
    log_probs = jax.nn.log_softmax(gj.forward(model, tokens[:1]).logits[0, :-1])
    expected = log_probs[np.arange(8), tokens[0, 1:]]
    np.testing.assert_allclose(gj.score(model, tokens[0]), expected, atol=1e-5)


@pytest.mark.parametrize("storage", ["int8", *nightly("float32", "bfloat16")])
def test_memory_does_not_grow_with_the_vocabulary(storage):
    """Whatever the table is stored in: neither logits nor a widened table."""

    def temporary_bytes(vocab):
        model = jax.eval_shape(lambda: quantise(tiny.model(tiny.gemma3(vocab_size=vocab)), storage))
        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        return jax.jit(gj.loss).lower(model, tokens).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(4096), temporary_bytes(16384)
    assert large - small < 1 << 16
