"""What must not change what a tower hears: the rest of the batch, and what lies behind a clip.

That these numbers are transformers' for clips alone is in `parity/test_gemma3n_audio.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parity import audio_tower

from gemma_jax import Runtime
from gemma_jax.audio.encoder import AudioEncoder, num_tokens

FRAMES = 41
run = jax.jit(AudioEncoder.__call__, static_argnums=(3, 4))


@pytest.fixture(scope="module")
def encoder():
    return audio_tower.random_encoder(tiny.audio())


def encode(encoder, features, lengths, runtime=Runtime()):
    return run(encoder, features, np.asarray(lengths), runtime, frozenset())[:2]


def noise(seed, clips=2):
    shape = (clips, FRAMES, tiny.audio().num_mels)
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


@pytest.mark.parametrize("garbage", [1e3, np.inf, np.nan], ids=str)
def test_what_lies_behind_a_clip_does_not_count(encoder, garbage):
    features, lengths = noise(0), [19, 34]
    before, counts = encode(encoder, features, lengths)
    for row, length in zip(features, lengths):
        row[length:] = garbage
    after, _ = encode(encoder, features, lengths)
    np.testing.assert_array_equal(before, after)
    for row, count in zip(after, counts):
        assert np.all(row[:count] != 0) and np.all(row[count:] == 0)


def test_neighbours_do_not_count(encoder):
    features, lengths = noise(0), [19, 34]
    before, _ = encode(encoder, features, lengths)
    after, _ = encode(encoder, np.stack([features[0], noise(1)[1]]), [19, 7])
    np.testing.assert_allclose(before[0], after[0], rtol=0, atol=1e-6)
    assert np.abs(before[1] - after[1]).max() > 0.1


def test_an_empty_clip_has_no_tokens(encoder):
    features, counts = encode(encoder, noise(0), [0, 19])
    assert counts.tolist() == [0, num_tokens(19, encoder.cfg)]
    assert np.all(features[0] == 0) and np.all(np.isfinite(features))
    nothing, counts = encode(encoder, noise(0)[:, :0], [0, 0])
    assert nothing.shape == (2, 0, encoder.cfg.d_tower) and counts.tolist() == [0, 0]


def test_bfloat16_is_near_float32(encoder):
    exact, _ = encode(encoder, noise(0), [19, 34])
    near, _ = encode(encoder, noise(0), [19, 34], Runtime(dtype=jnp.dtype("bfloat16")))
    assert near.dtype == jnp.bfloat16
    error = np.abs(np.asarray(near, np.float32) - np.asarray(exact))
    assert 0 < error.max() < 0.15


def test_gradients_reach_every_parameter(encoder):
    def loss(encoder):
        features, _, _ = encoder(noise(0), np.array([19, 34]), Runtime())
        return jnp.sum(jnp.square(features) * jnp.arange(features.shape[-1]))

    grads = jax.jit(jax.grad(loss))(encoder)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), jax.tree_util.keystr(path)
