"""Sounds of every kind in, one row of samples out."""

from pathlib import Path

import numpy as np
import pytest
from sounds import tone, written

from gemma_jax import Audio
from gemma_jax.audio.waves import split_at_quiet

SHORT = tone(0.02)  # of 320 samples


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "tone.wav"
    path.write_bytes(written(SHORT, subtype="FLOAT"))
    return path


# Sources.


@pytest.mark.parametrize(
    "source",
    [Path, str, Path.read_bytes, lambda path: memoryview(path.read_bytes()), Audio],
)
def test_sources(file, source):
    clip = Audio(source(file))
    assert np.array_equal(clip.samples, SHORT) and clip.samples.dtype == np.float32
    assert clip.sampling_rate == 16_000 and clip.seconds == 0.02
    assert np.array_equal(Audio(clip).samples, SHORT)


def test_arrays_come_with_their_rate():
    for clip in (Audio(SHORT, sampling_rate=8_000), Audio((SHORT, np.int64(8_000)))):
        assert np.array_equal(clip.samples, SHORT) and clip.seconds == 0.04
        assert type(clip.sampling_rate) is int


def test_jax_arrays():
    import jax.numpy as jnp

    assert np.array_equal(Audio(jnp.asarray(SHORT), sampling_rate=16_000).samples, SHORT)


def test_sounds_do_not_change():
    array = SHORT.copy()
    clip = Audio(array, sampling_rate=16_000)
    array[:] = 0
    assert np.array_equal(clip.samples, SHORT)
    with pytest.raises(ValueError, match="read-only"):
        clip.samples[0] = 1


def test_sounds_show_themselves():
    assert repr(Audio(tone(2.5, 44_100), sampling_rate=44_100)) == "Audio(2.50 s at 44100 Hz)"


@pytest.mark.parametrize(
    ("kind", "silence", "half"),
    [
        (np.int8, 0, 64),
        (np.uint8, 128, 192),
        (np.int16, 0, 2**14),
        (">i2", 0, 2**14),
        (np.int32, 0, 2**30),
        (np.float16, 0, 0.5),
        (np.float32, 0, 0.5),
        (np.float64, 0, 0.5),
    ],
)
def test_full_scale_is_one(kind, silence, half):
    array = np.array([silence, half], kind)
    assert Audio(array, sampling_rate=16_000).samples.tolist() == [0, 0.5]
    stereo = np.stack([array, array[::-1]], axis=1)
    assert Audio(stereo, sampling_rate=16_000).samples.tolist() == [0.25, 0.25]


# Files.


@pytest.mark.parametrize(
    ("form", "subtype", "step"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),  # float32 holds no more
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAVEX", "PCM_16", 2**-15),
        ("AIFF", "PCM_16", 2**-15),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
    ],
)
def test_exact_formats(form, subtype, step):
    clip = Audio(written(SHORT, form=form, subtype=subtype))
    assert clip.sampling_rate == 16_000 and len(clip.samples) == len(SHORT)
    assert np.abs(clip.samples - SHORT).max() <= step


@pytest.mark.parametrize("form", ["WAV", "AIFF", "FLAC"])
def test_blocks_join(form):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 200_001).astype(np.float32)
    np.testing.assert_allclose(Audio(written(sound, form=form)).samples, sound, atol=2**-15)


@pytest.mark.parametrize(
    ("form", "subtype", "rate"),
    [
        ("MP3", "MPEG_LAYER_III", 16_000),
        ("MP3", "MPEG_LAYER_III", 44_100),
        ("OGG", "VORBIS", 44_100),
        ("OGG", "OPUS", 48_000),
    ],
)
def test_lossy_formats(form, subtype, rate):
    """Ten seconds: several blocks, which join without a seam."""
    sound = tone(10, rate)
    clip = Audio(written(sound, rate, form, subtype=subtype))
    assert clip.sampling_rate == rate and len(clip.samples) == len(sound)
    middle = slice(rate // 2, -rate // 2)
    assert np.abs(clip.samples[middle] - sound[middle]).max() < 0.05


def test_channels_are_averaged():
    sound = np.stack([SHORT, np.zeros_like(SHORT), -SHORT, SHORT], axis=1)
    clip = Audio(written(sound, subtype="FLOAT"))
    np.testing.assert_allclose(clip.samples, SHORT / 4, atol=1e-7)


def test_a_name_does_not_say_what_a_file_is(tmp_path):
    for name in ("tone.raw", "tone.gsm", "tone.txt", "tone"):
        (tmp_path / name).write_bytes(written(SHORT, subtype="FLOAT"))
        assert np.array_equal(Audio(tmp_path / name).samples, SHORT)


# Rates.


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 192_000])
def test_any_rate_becomes_that_of_the_model(rate):
    clip = Audio(tone(1, rate), sampling_rate=rate).at(16_000)
    assert clip.sampling_rate == 16_000 and len(clip.samples) == 16_000
    middle = slice(2_000, -2_000)
    np.testing.assert_allclose(clip.samples[middle], tone(1)[middle], atol=1e-3)


def test_what_the_lower_rate_cannot_hold_is_gone():
    clip = Audio(tone(1, 48_000, hertz=10_000), sampling_rate=48_000).at(16_000)
    assert np.abs(clip.samples[1_000:-1_000]).max() < 1e-3


def test_the_same_rate_is_the_same_clip():
    clip = Audio(SHORT, sampling_rate=16_000)
    assert clip.at(16_000) is clip


def test_a_sample_at_a_high_rate_stays_a_sample():
    assert len(Audio(np.ones(1), sampling_rate=768_000).at(16_000).samples) == 1


# Long clips.


def speech(*lengths: float, rate: int = 1_000) -> Audio:
    """Noise and half a second of faint noise in turn; `lengths` are those of the noise."""
    random, parts = np.random.default_rng(0), []
    for length in lengths:
        parts.append(random.uniform(-0.5, 0.5, int(length * rate)))
        parts.append(random.uniform(-0.01, 0.01, rate // 2))
    return Audio(np.concatenate(parts[:-1]), sampling_rate=rate)


def test_short_clips_stay_whole():
    clip = speech(30)
    assert split_at_quiet(clip) == [clip]


def test_cuts_lie_in_the_pauses():
    clip = speech(10, 12, 6, 15, 9, 20)  # pauses end at 10.5, 23, 29.5, 45, 54.5 s
    parts = split_at_quiet(clip)
    assert np.array_equal(np.concatenate([part.samples for part in parts]), clip.samples)
    assert all(part.seconds <= 30 and part.sampling_rate == 1_000 for part in parts)
    for cut in np.cumsum([part.seconds for part in parts])[:-1]:
        assert any(end - 0.5 < cut < end for end in (10.5, 23, 29.5, 45, 54.5)), cut
    assert len(parts) == 3


@pytest.mark.parametrize("seconds", [30.001, 30.5, 59, 61, 300])
@pytest.mark.parametrize("level", [0, 0.5])
def test_what_has_no_pause_is_cut_all_the_same(seconds, level):
    """Silence, too, in as few parts as can be; none is a crumb."""
    clip = Audio(np.full(int(seconds * 1_000), level, np.float32), sampling_rate=1_000)
    lengths = [part.seconds for part in split_at_quiet(clip)]
    assert sum(lengths) == pytest.approx(seconds) and max(lengths) <= 30
    assert min(lengths) >= 0.99 and len(lengths) <= seconds / 29 + 1


@pytest.mark.parametrize("limit", [1, 2, 5, 99])
def test_limits_of_a_few_samples(limit):
    clip = Audio(np.random.default_rng(0).uniform(-1, 1, 200), sampling_rate=1_000)
    parts = split_at_quiet(clip, limit / 1_000)
    assert np.array_equal(np.concatenate([part.samples for part in parts]), clip.samples)
    assert max(len(part.samples) for part in parts) <= limit


def test_no_limit_below_a_sample():
    with pytest.raises(ValueError, match="max_seconds=0 must hold a sample"):
        split_at_quiet(Audio(SHORT, sampling_rate=16_000), 0)
