"""`gemma-jax encode-audio`: what the library makes, in a file."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from sounds import tone, written

from gemma_jax import Audio
from gemma_jax.audio.mel import log_mel, log_mel_batch
from gemma_jax.encoder_config import SoundProcessing
from gemma_jax.presets import USM_CONFORMER


@pytest.fixture
def file(tmp_path):
    """`file(name, seconds, rate)` writes a tone in the format that the name says."""

    def write(name: str = "tone.wav", seconds: float = 0.5, rate: int = 16_000, **options):
        path = tmp_path / name
        form = path.suffix[1:].upper()
        path.write_bytes(written(tone(seconds, rate), rate, form, **options))
        return path

    return write


@pytest.fixture
def encode(cli, tmp_path):
    """`encode(*words)` returns what the command wrote."""

    def call(*words) -> dict[str, np.ndarray]:
        output = tmp_path / "out.safetensors"
        ran = cli("encode-audio", *words, "--output", output)
        assert (ran.code, ran.out, ran.err) == (0, "", "")
        return load_file(output)

    return call


def test_clips_in_order(encode, file):
    files = file("a.wav", 1), file("b.flac", 0.3), file("c.ogg", 0.6, 44_100)
    arrays = encode(*files)
    assert arrays.keys() == {"input_features", "input_features_mask"}
    clips = [Audio(path).at(16_000).samples for path in files]
    features, mask = log_mel_batch(clips)
    assert np.array_equal(arrays["input_features"], features)
    assert np.array_equal(arrays["input_features_mask"], mask)
    assert features.shape == (3, 97, 128) and mask.dtype == bool
    assert arrays["input_features"].dtype == np.float32


def test_settings_of_a_model(encode, file, monkeypatch):
    sounds = SoundProcessing(sampling_rate=8_000, max_frequency=3_800.0)
    cfg = SimpleNamespace(audio=replace(USM_CONFORMER, sounds=sounds, num_mels=40))
    monkeypatch.setattr("gemma_jax.cli.common.find_config", lambda source: (cfg, None))
    path = file()
    arrays = encode(path, "--model", "mine")
    expected = log_mel(Audio(path).at(8_000).samples, sounds, 40)
    assert np.array_equal(arrays["input_features"], expected[None])


def test_a_model_without_a_tower(refused, file, tmp_path):
    words = (file(), "--model", "gemma3-270m", "--output", tmp_path / "out")
    assert refused("encode-audio", *words) == "gemma3-270m has no audio tower"


def test_thirty_seconds_are_the_most(encode, refused, file, tmp_path):
    assert encode(file("just.flac", 30))["input_features"].shape == (1, 2997, 128)
    path = file("long.flac", 30.1)
    error = refused("encode-audio", path, "--output", tmp_path / "new")
    assert error == f"{path} is 30.1 s long; expected at most 30 s: give --split"
    assert not (tmp_path / "new").exists()


def test_long_clips_are_split(encode, file):
    arrays = encode(file("a.flac", 1), file("b.flac", 31), "--split")
    assert arrays["num_clips"].tolist() == [1, 2]
    assert arrays["input_features"].shape[0] == 3
    assert arrays["input_features_mask"][0].sum() == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"hello", "is no sound that can be read"),
        (written(tone())[:1_000], "is cut off"),
        (written(np.full(9, np.nan), subtype="FLOAT"), "no finite numbers"),
    ],
)
def test_one_bad_file_leaves_no_output(refused, file, tmp_path, content, message):
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    error = refused("encode-audio", file(), bad, "--output", tmp_path / "out")
    assert message in error and str(bad) in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_no_files(refused, tmp_path):
    assert "missing argument 'FILE'" in refused("encode-audio", "--output", tmp_path / "out")


def test_missing_soundfile(refused, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    error = refused("encode-audio", file(), "--output", tmp_path / "out")
    assert error == 'sounds need soundfile: pip install "gemma-jax[audio]"'


def test_decoders_write_nothing_and_jax_stays_out(file, tmp_path):
    """The MP3 is cut off: its decoder would say so on stderr, beside our line."""
    code = (
        "import sys; from gemma_jax.cli.app import run; code = run(sys.argv[1:]); "
        "print(code, *(name for name in ('jax', 'flax') if name in sys.modules))"
    )
    path = file("tone.mp3", 4)
    words = ["encode-audio", str(path), "--output", str(tmp_path / "out")]
    for content, code_, lines in ((path.read_bytes(), "0", 0), (path.read_bytes()[:4_000], "2", 1)):
        path.write_bytes(content)
        ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert ran.stdout.strip() == code_
        assert len(ran.stderr.splitlines()) == lines, ran.stderr
