"""Mel frames: those of transformers, alone, in a batch, and as the samples come."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gemma_jax.audio.mel import MelStream, log_mel, log_mel_batch, mel_filters, num_frames
from gemma_jax.encoder_config import SoundProcessing

DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "mel.safetensors")
NOISE = json.loads((DATA / "mel.json").read_text())
WAVES = [GOLDEN[f"in.wave_{i}"] for i in range(3)]
PUBLISHED = SoundProcessing()
# Of 9 samples every 4, which makes exhaustive tests cheap.
SMALL = SoundProcessing(
    sampling_rate=1_000, frame_length=8, hop_length=4, fft_length=16, min_frequency=50,
    max_frequency=500, pad_multiple=6,
)  # fmt: skip


def assert_as_in_transformers(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within the rounding of its Fourier transform in float32, stored with the golden."""
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.abs(np.exp(ours) - np.exp(theirs)).max() < NOISE["noise_fp64_linear_mel"]
    loud = np.exp(theirs) > 0.01
    assert np.abs(ours - theirs)[loud].max() < NOISE["noise_fp64_log_where_mel_above_1e_2"]


def test_one_clip_as_in_transformers():
    assert_as_in_transformers(log_mel(WAVES[0]), GOLDEN["out.single_mel"][0])
    mel, mask = log_mel_batch(WAVES[:1])
    assert np.array_equal(mel[0], log_mel(WAVES[0]))
    assert np.array_equal(mask, GOLDEN["out.single_mask"])


def test_a_batch_as_in_transformers():
    mel, mask = log_mel_batch(WAVES)
    assert_as_in_transformers(mel, GOLDEN["out.batch_mel"])
    assert mask.dtype == bool and np.array_equal(mask, GOLDEN["out.batch_mask"])


def test_without_filling_up_as_in_transformers():
    bare = replace(PUBLISHED, pad_multiple=1)
    assert_as_in_transformers(log_mel(WAVES[2], bare), GOLDEN["out.odd_mel"][0])


def test_a_tone_lies_in_its_band():
    """1 kHz is the 42nd of 128 triangles between 125 Hz and 7.6 kHz."""
    tone = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000)
    (loudest,) = set(np.argmax(log_mel(tone.astype(np.float32))[:-1], axis=1).tolist())
    centre = 15.625 * np.argmax(mel_filters(PUBLISHED, 128)[:, loudest])
    assert abs(centre - 1_000) < 30


def test_silence_lies_on_the_floor():
    assert np.array_equal(
        log_mel(np.zeros(1_000, np.float32)), np.full((4, 128), np.log(1e-5), "f")
    )


def test_filters_are_triangles_that_cover_the_range():
    filters = mel_filters(PUBLISHED, 40)
    assert filters.shape == (513, 40) and filters.min() == 0 and (filters.max(axis=0) > 0.5).all()
    inner = filters[20:450].sum(axis=1)  # rising and falling sides add up to one
    np.testing.assert_allclose(inner[10:], 1, atol=1e-9)


@pytest.mark.parametrize(
    ("samples", "frames"),
    [
        (0, 0),
        (1, 1),
        (512, 1),
        (513, 1),
        (640, 1),
        (641, 2),
        (768, 2),
        (16_000, 97),
        (480_000, 2997),
    ],
)
def test_how_many_frames(samples, frames):
    assert num_frames(samples) == frames
    if samples:
        assert log_mel(np.zeros(samples, np.float32)).shape == (frames, 128)


def test_a_clip_shorter_than_a_frame_is_filled_up():
    short = WAVES[0][:100]
    assert np.array_equal(log_mel(short), log_mel(np.pad(short, (0, 540))))


def test_long_clips_are_transformed_in_blocks(monkeypatch):
    whole = log_mel(WAVES[0])
    monkeypatch.setattr("gemma_jax.audio.mel.BLOCK", 10)
    np.testing.assert_allclose(log_mel(WAVES[0]), whole, atol=1e-6)


@pytest.mark.parametrize(
    "bad", [np.zeros(0, np.float32), np.zeros((2, 800), np.float32), np.zeros(800, np.int16)]
)
def test_what_is_no_clip(bad):
    for call in (log_mel, lambda samples: log_mel_batch([WAVES[0], samples])):
        with pytest.raises(ValueError, match="expected samples as"):
            call(bad)


def test_no_clips():
    with pytest.raises(ValueError, match="one clip of sound at least"):
        log_mel_batch([])


# As they come.


def streamed(samples: np.ndarray, cuts, processing=PUBLISHED, num_mels=128) -> np.ndarray:
    stream = MelStream(processing, num_mels)
    pieces = np.split(samples, sorted(cuts))
    return np.concatenate([*(stream.push(piece) for piece in pieces), stream.finish()])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3_000), st.lists(st.integers(0, 3_000), max_size=20))
def test_any_split_gives_the_frames_of_the_whole(length, cuts):
    samples = WAVES[0][:length]
    ours, whole = streamed(samples, cuts), log_mel(samples)
    assert ours.shape == whole.shape
    np.testing.assert_allclose(ours, whole, atol=1e-6)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 9, 50])
@pytest.mark.parametrize("length", range(1, 40, 3))
def test_small_frames_sample_by_sample(length, step):
    samples = WAVES[0][:length]
    ours = streamed(samples, range(step, length, step), SMALL, 5)
    np.testing.assert_allclose(ours, log_mel(samples, SMALL, 5), atol=1e-6)


def test_a_frame_is_out_as_soon_as_its_samples_are_in():
    stream = MelStream()
    frames = [len(stream.push(WAVES[0][i : i + 1])) for i in range(1_000)]
    assert np.flatnonzero(frames).tolist() == [512, 672, 832, 992]
    assert stream.num_samples == 1_000 and stream.num_frames == 4


def test_a_stream_keeps_no_more_than_a_frame():
    stream = MelStream()
    stream.push(WAVES[0])
    assert stream._waiting.nbytes < 513 * 4 and stream._waiting.base is None


def test_a_stream_of_nothing_has_no_frames():
    stream = MelStream()
    assert stream.push(np.zeros(0, np.float32)).shape == stream.finish().shape == (0, 128)


def test_a_stream_ends_once():
    stream = MelStream()
    stream.finish()
    for call in (stream.finish, lambda: stream.push(WAVES[0])):
        with pytest.raises(ValueError, match="has ended; begin another"):
            call()
