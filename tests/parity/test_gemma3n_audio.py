"""Numbers of transformers' audio tower of Gemma 3n, float32, on a tiny one.

Its bound on values (`gradient_clipping`) is small enough to matter. Tolerances as in
`test_gemma3_text.py`.
"""

import jax
import numpy as np
import pytest
from marks import nightly
from parity import audio_tower
from parity.goldens import DATA, assert_close, case

from gemma_jax import Runtime
from gemma_jax.audio.encoder import AudioEncoder, num_tokens

FOLDER = DATA / "g3n_audio"
THEIRS = {
    "audio.subsample": "subsample_output",
    "audio.layer_outputs": "conformer_outputs",
    "audio.tower": "last_hidden_state",
}


@pytest.fixture(scope="module", params=["unrolled", *nightly("scan")])
def encoder(request):
    return audio_tower.load(FOLDER, request.param)


run = jax.jit(AudioEncoder.__call__, static_argnums=(3, 4))


def encode(encoder, runtime=Runtime()):
    given, expected, tolerance = case("g3n_audio", "forward")
    lengths = (~given["pad_mask"]).sum(1)
    out = run(encoder, given["input_features"], lengths, runtime, frozenset(AudioEncoder.captures))
    return *out, lengths, expected, tolerance


def test_tower_and_every_layer(encoder):
    """Of the shorter clip what has windows inside of it: in transformers it sees the padding."""
    _, _, captured, lengths, expected, tolerance = encode(encoder)
    for i, length in enumerate(lengths):
        whole = ... if i == 0 else slice((length - 7) // 4 + 1)
        for ours, theirs in THEIRS.items():
            got, wanted = captured[ours], expected[theirs]
            if theirs == "last_hidden_state":
                assert_close(got[i], wanted[i], tolerance[theirs])
            else:
                at = (..., i, whole, slice(None)) if i else (..., i, slice(None), slice(None))
                assert_close(got[at], wanted[at], tolerance[theirs])


def test_clips_in_a_batch_are_what_transformers_makes_of_each_alone(encoder):
    """Of every length modulo 16, with something else behind each."""
    given, expected, tolerance = case("g3n_audio", "alone")
    names = {int(name.removeprefix("tokens_")): name for name in expected}
    clip = given["input_features"]
    rows = np.random.default_rng(0).normal(0, 9, (len(names) + 1, len(clip) + 9, clip.shape[1]))
    for row, length in zip(rows, names):
        row[:length] = clip[:length]
    lengths = np.array([*names, len(clip) + 9])  # and a longer one
    features, counts, _ = run(encoder, rows, lengths, Runtime(), frozenset())
    for row, count, length in zip(features, counts, names):
        wanted = expected[names[length]]
        assert count == len(wanted) == num_tokens(length, encoder.cfg)
        assert_close(row[:count], wanted, tolerance[names[length]])
    assert {length % 16 for length in names} == set(range(16))


@pytest.mark.parametrize("length", [16, 83, *nightly(1, 2, 5, 81, 82, 84, 85, 86, 87, 91, 96)])
def test_a_clip_alone_needs_no_padding(encoder, length):
    given, expected, tolerance = case("g3n_audio", "alone")
    clip, name = given["input_features"][None, :length], f"tokens_{length}"
    features, _, _ = run(encoder, clip, None, Runtime(), frozenset())
    assert_close(features[0], expected[name], tolerance[name])


def test_padded_tokens_are_counted_and_zero(encoder):
    features, counts, _, _, expected, _ = encode(encoder)
    np.testing.assert_array_equal(counts, (~expected["pad_mask_out"]).sum(1))
    assert np.all(np.asarray(features)[expected["pad_mask_out"]] == 0)


@pytest.mark.parametrize(
    "mistake, change",
    [
        ({"clip": 1e10}, 1.31),
        ({"score_cap": 1e4}, 0.122),
        ({"left_context": 6}, 0.994),
        ({"residual_weight": 1.0}, 3.19),
    ],
    ids=str,
)
def test_mistakes_show(mistake, change):
    """The stored sensitivity: by how much the result changes when one thing is wrong."""
    right = audio_tower.load(FOLDER, "unrolled")
    features, _, _, _, expected, _ = encode(audio_tower.changed(right, **mistake))
    error = np.abs(np.asarray(features) - expected["last_hidden_state"]).max()
    assert 0.98 * change < error < 1.02 * change
