"""Broken, hostile and strange sounds: one line each, and nothing allocated for mere claims."""

import io
import os
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
from sounds import tone, written

from gemma_jax import Audio
from gemma_jax.audio.waves import split_at_quiet

SECOND = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)


def refusal(source, **options) -> str:
    """The one line of its error."""
    with pytest.raises(ValueError) as caught:
        Audio(source, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a sound"),
        (b"R", "is no sound that can be read"),
        (b"hello, this is text " * 9, "is no sound that can be read"),
        (bytes(10_000), "is no sound that can be read"),
        (written(SECOND)[:30], "is no sound that can be read"),
        (written(SECOND)[:44], "is cut off"),
        (written(SECOND[:0]), "has no samples"),
        (written(SECOND, form="AU"), "is of format AU; expected AIFF, FLAC"),
        (written(SECOND, form="HTK"), "is of format HTK"),
    ],
)
def test_what_is_no_sound(tmp_path, content, message):
    assert refusal(content).startswith("the sound given as bytes " + message)
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} {message}")


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "AIFF", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_files_that_are_cut_off(form, share):
    data = written(tone(4), form=form)
    line = refusal(data[: int(share * len(data))])
    assert "cut off" in line or "no sound that can be read" in line


def test_bytes_that_are_damaged():
    data = bytearray(written(SECOND, form="FLAC"))
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    assert "is a broken sound file, or is cut off" in refusal(bytes(data))


# What headers may say.


def patched(data: bytes, at: int, layout: str, *values: int) -> bytes:
    end = at + struct.calcsize(layout)
    return data[:at] + struct.pack(layout, *values) + data[end:]


WAV, FLAC = written(SECOND), written(SECOND, form="FLAC")
XING = 13  # of an MP3 as LAME writes it


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (patched(WAV, 40, "<I", 4_000_000_000), "is cut off: 4,000,000,000 bytes"),
        (patched(WAV, 40, "<I", 0xFFFF_FFFF), "is cut off: 4,294,967,295 bytes"),
        (patched(FLAC, 22, ">I", 0xFFFF_FFFF), "declares 4,294,967,295 samples at 16,000 Hz"),
        (patched(FLAC, 22, ">I", 20_000), "is cut off: 16,000 of the 20,000 samples declared"),
        (patched(WAV, 22, "<HIIH", 1_000, 16_000, 32_000_000, 2_000), "has 1,000 channels"),
        (patched(WAV, 22, "<H", 0), "is no sound that can be read (Channel count is zero)"),
        (patched(WAV, 24, "<I", 0), "is no sound that can be read"),
        (patched(WAV, 24, "<I", 999), "has 999 samples per second; expected 1,000 to 768,000"),
        (patched(WAV, 24, "<I", 2_000_000_000), "has 2,000,000,000 samples per second"),
    ],
)
def test_forged_headers(data, message):
    Audio(WAV)  # what is imported at first use is not counted
    tracemalloc.start()
    try:
        line = refusal(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in line
    assert peak < 2_000_000


def test_an_mp3_that_declares_years():
    data = written(tone(4), form="MP3")
    tag = data.find(b"Xing") if b"Xing" in data else data.find(b"Info")
    line = refusal(patched(data, tag + 8, ">I", 0x7FFF_FFFF))
    assert "samples at 16,000 Hz; expected at most" in line


@pytest.mark.parametrize(
    ("loudness", "message"),
    [
        ((0, 1), "samples declared are there"),
        ((1, 0), "is an MP3 file of unknown length; convert it to WAV or FLAC"),
    ],
    ids=["too long", "too short"],
)
def test_an_mp3_whose_length_is_guessed(loudness, message):
    """Bit rates vary, and no header says how long it is: what would be lost is refused."""
    sound = np.concatenate([level * np.tile(SECOND, 5) for level in loudness])
    data = written(sound, form="MP3")
    assert Audio(data).seconds == 10
    assert message in refusal(data[data.find(data[:2], 100) :])


def test_wav_from_a_pipe_declares_more_than_there_is():
    for size in (0xFFFF_FFFF, 0x7FFF_F000):
        data = patched(patched(WAV, 4, "<I", min(size + 36, 0xFFFF_FFFF)), 40, "<I", size)
        np.testing.assert_allclose(Audio(data).samples, SECOND, atol=1e-4)


def test_flac_from_a_pipe_does_not_say_how_long_it_is():
    sound = Audio(patched(FLAC, 22, ">I", 0))
    np.testing.assert_allclose(sound.samples, SECOND, atol=1e-4)


# Numbers.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_must_be_finite(bad):
    array = SECOND.copy()
    array[9_000] = bad
    assert "no finite numbers" in refusal(array, sampling_rate=16_000)
    assert "no finite numbers" in refusal(written(array, subtype="FLOAT"))
    assert "no finite numbers" in refusal(written(np.stack([SECOND, array], 1), subtype="DOUBLE"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(0), "has no samples"),
        (np.zeros((0, 2)), "has no samples"),
        (np.zeros(()), "has shape []; expected [samples]"),
        (np.zeros((2, 2, 2)), "has shape [2, 2, 2]"),
        (np.zeros((2, 100)), "has 100 channels; expected 1 to 64; transpose it: array.T"),
        (np.zeros((2, 0)), "has 0 channels"),
        (np.zeros(4, np.int64), "has dtype int64; expected int16"),
        (np.zeros(4, np.uint16), "has dtype uint16"),
        (np.zeros(4, bool), "has dtype bool"),
        (np.zeros(4, complex), "has dtype complex128"),
        (np.array(["a"]), "has dtype <U1"),
        (np.full(4, 1e300), "no finite numbers"),
        (np.arange(-999.0, 999), "has floats from -999 to 998; expected [-1, 1]"),
    ],
)
def test_wrong_arrays(array, message):
    assert message in refusal(array, sampling_rate=16_000)


@pytest.mark.parametrize("rate", [0, -1, 999, 1_000_000, 16_000.5, np.nan, True, "16000", SECOND])
def test_wrong_rates(rate):
    assert "samples per second" in refusal(SECOND, sampling_rate=rate)
    with pytest.raises(ValueError, match="samples per second"):
        Audio(SECOND, sampling_rate=16_000).at(rate)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (SECOND, {}, "needs its rate, such as sampling_rate=16000"),
        ("a.wav", {"sampling_rate": 16_000}, "a file or a clip knows its"),
        ([0.0, 0.1], {}, "got list"),
        ((16_000, SECOND), {}, "got int"),
        (None, {}, "got NoneType"),
        ("https://example.com/a.wav", {}, "is no path: download the sound"),
    ],
)
def test_wrong_sources(source, options, message):
    assert message in refusal(source, **options)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Audio(tmp_path / "none.wav")
    with pytest.raises(IsADirectoryError):
        Audio(tmp_path)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").endswith("is no regular file")


@pytest.mark.parametrize("module", ["soundfile", "soxr"])
def test_missing_libraries(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}: pip install \"gemma-jax\[audio\]\""):
        Audio(WAV).at(8_000)


# Length.


def test_an_hour_is_legal():
    """Of silence, which FLAC holds in a few kilobytes."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8_000, 1, format="FLAC") as out:
        for _ in range(60):
            out.write(np.zeros(60 * 8_000, np.int16))
    clip = Audio(file.getvalue())
    assert clip.seconds == 3_600
    assert [part.seconds for part in split_at_quiet(clip)] == [30] * 120


def test_a_day_is_not():
    data = patched(FLAC, 22, ">I", 24 * 3_600 * 16_000)
    assert "declares 1,382,400,000 samples at 16,000 Hz; expected at most" in refusal(data)


def test_silence_is_a_sound():
    clip = Audio(written(np.zeros(100)))
    assert len(clip.samples) == 100 and not clip.samples.any()
