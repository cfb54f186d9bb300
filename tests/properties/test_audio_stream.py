"""A clip that comes in pieces is what it is as a whole, however it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import audio_tower

from gemma_jax import Audio, Runtime
from gemma_jax.audio import streaming
from gemma_jax.audio.encoder import AudioEncoder, num_tokens
from gemma_jax.audio.mel import log_mel
from gemma_jax.audio.streaming import AudioStream
from gemma_jax.presets import USM_CONFORMER

LONGEST = 80  # mel frames
NOISE = 2e-5  # of values up to 5, by another order of summation
BFLOAT16 = Runtime(dtype=jnp.dtype("bfloat16"))
run = jax.jit(AudioEncoder.__call__, static_argnums=(3, 4))


@pytest.fixture(scope="module")
def encoder():
    return audio_tower.random_encoder(tiny.audio())


def whole(encoder, mel_TM):
    """All soft tokens of a clip, `[n, C]`; one program for all lengths."""
    padded = np.zeros((1, LONGEST, mel_TM.shape[1]), np.float32)
    padded[0, : len(mel_TM)] = mel_TM
    features, counts, _ = run(encoder, padded, np.array([len(mel_TM)]), Runtime(), frozenset())
    return np.asarray(features[0, : counts[0]])


def mel_frames(count, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (count, 10)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 12_000),
    cuts=st.lists(st.integers(0, 12_000), max_size=12),
    seed=st.integers(0, 9),
)
def test_any_cut_of_the_samples_gives_the_tokens_of_the_whole(encoder, num_samples, cuts, seed):
    samples = np.random.default_rng(seed).normal(0, 0.1, num_samples).astype(np.float32)
    stream = AudioStream(encoder)
    tokens = [stream.push(piece) for piece in np.split(samples, sorted(cuts))]
    tokens = np.concatenate([*tokens, stream.finish()])
    expected = whole(encoder, log_mel(samples, encoder.cfg.sounds, encoder.cfg.num_mels))
    assert tokens.shape == expected.shape
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=NOISE)


@pytest.mark.parametrize("count", range(LONGEST - 15, LONGEST + 1))
def test_every_length_modulo_16(encoder, count):
    mel_TM = mel_frames(count)
    stream = AudioStream(encoder)
    tokens = np.concatenate([stream.push_mel(mel_TM), stream.finish()])
    np.testing.assert_allclose(tokens, whole(encoder, mel_TM), rtol=0, atol=NOISE)


def test_token_i_is_out_when_frame_16_i_plus_6_is_in(encoder):
    mel_TM, stream, came = mel_frames(LONGEST), AudioStream(encoder, BFLOAT16), []
    programs = streaming.step._cache_size()
    for i, frame in enumerate(mel_TM):
        came += [i] * len(stream.push_mel(frame[None]))
    assert streaming.step._cache_size() == programs + 1
    assert came == [6, 22, 38, 54, 70] == [16 * i + 6 for i in range(stream.num_tokens)]
    # ... and not earlier: that frame counts.
    changed = mel_TM[:23].copy()
    changed[22] += 1
    tokens = [AudioStream(encoder).push_mel(m) for m in (mel_TM[:23], changed)]
    assert np.abs(tokens[0][0] - tokens[1][0]).max() == 0
    assert np.abs(tokens[0][1] - tokens[1][1]).max() > 1e-3


@pytest.mark.parametrize("change", [dict(reduction=1), dict(conv_kernel=5), dict(left_context=1)])
def test_towers_of_other_windows(change):
    """Also where more frames are looked ahead than a token has."""
    other = audio_tower.random_encoder(tiny.audio(**change), "unrolled")
    mel_TM = mel_frames(43)
    stream = AudioStream(other)
    tokens = np.concatenate([stream.push_mel(mel_TM), stream.finish()])
    assert len(tokens) == num_tokens(43, other.cfg)
    np.testing.assert_allclose(tokens, whole(other, mel_TM), rtol=0, atol=NOISE)


def test_several_tokens_per_step_and_an_embedder(encoder):
    mel_TM = mel_frames(LONGEST - 3)
    stream = AudioStream(encoder, tokens_per_step=2, embed=lambda x: x[:, :5] * 2)
    assert stream.push_mel(mel_TM[:22]).shape == (0, 5)
    assert stream.push_mel(mel_TM[22:23]).shape == (2, 5)
    tokens = np.concatenate([stream.push_mel(mel_TM[23:]), stream.finish()])
    np.testing.assert_allclose(tokens, 2 * whole(encoder, mel_TM)[2:, :5], rtol=0, atol=2 * NOISE)


def test_streams_side_by_side(encoder):
    """Of two clips in one state, each has its own length."""
    cfg, clips = encoder.cfg, [mel_frames(39), mel_frames(28, seed=1)]
    state = streaming.begin(cfg, encoder.tower.layer_groups, jnp.dtype("float32"), clips=2)
    rows = np.zeros((2, 48, cfg.num_mels), np.float32)
    for row, clip in zip(rows, clips):
        row[9 : 9 + len(clip)] = clip
    lengths, found = np.array([len(clip) for clip in clips], np.int32), []
    for i in range(0, 48, 16):
        state, x = streaming.step(encoder, state, rows[:, i : i + 16], lengths, Runtime())
        found.append(x)
    for row, clip in zip(np.concatenate(found, axis=1), clips):
        expected = whole(encoder, clip)
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=NOISE)
        assert np.all(row[len(expected) :] == 0)


def test_an_ended_or_empty_stream(encoder):
    stream = AudioStream(encoder)
    assert stream.push(np.zeros(0, np.float32)).shape == (0, 24)
    assert stream.finish().shape == (0, 24)
    with pytest.raises(ValueError, match="this stream has ended; begin another"):
        stream.push(np.zeros(10, np.float32))
    for count in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=f"tokens_per_step={count!r} must be a positive int"):
            AudioStream(encoder, tokens_per_step=count)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "expected samples at 16000 Hz as an array, got NoneType"),
        (b"1234", "as an array, got bytes"),
        (Audio(np.zeros(9), sampling_rate=8_000), "as an array, got Audio"),
        ((np.zeros(9), 8_000), "as an array, got tuple"),
        (np.zeros(9, np.int64), "has dtype int64"),
        (np.full(9, np.nan), "no finite numbers"),
    ],
)
def test_a_stream_refuses_what_is_no_piece_and_goes_on(encoder, samples, message):
    mel_TM = log_mel(np.zeros(4_000, np.float32), encoder.cfg.sounds, encoder.cfg.num_mels)
    stream = AudioStream(encoder)
    first = stream.push(np.zeros(2_000))
    with pytest.raises(ValueError, match=message):
        stream.push(samples)
    tokens = np.concatenate([first, stream.push(np.zeros(2_000)), stream.finish()])
    np.testing.assert_allclose(tokens, whole(encoder, mel_TM), rtol=0, atol=NOISE)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((16, 9), np.float32), r"mel frames as floats \[T, 10\], got \[16, 9\]"),
        (np.zeros(16, np.float32), r"mel frames as floats \[T, 10\], got \[16\]"),
        (np.full((16, 10), np.nan, np.float32), "mel frames hold NaN or infinity"),
    ],
)
def test_mel_frames_that_cannot_be_heard(encoder, frames, message):
    with pytest.raises(ValueError, match=message):
        AudioStream(encoder).push_mel(frames)


def test_the_state_is_two_megabytes_whatever_the_length():
    """12 keys and values and 4 frames of the convolution per layer, and a row per convolution."""
    encoder = audio_tower.abstract_encoder(USM_CONFORMER, "scan")
    groups = encoder.tower.layer_groups
    state = jax.eval_shape(lambda: streaming.begin(USM_CONFORMER, groups, jnp.dtype("float32")))
    convs = 128 + 64 * 128 + 2 * 2  # a row of each, and two sums of each
    assert state.nbytes == 4 * (12 * (12 + 12 + 4) * 1_536 + convs + 1) == 2_097_684
