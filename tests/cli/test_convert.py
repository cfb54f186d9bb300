"""`gemma-jax convert`."""

import errno
import json
import os
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "parity" / "data"


def test_there_and_back(cli, talker, tmp_path):
    """Orbax and back gives the bytes that went in, and all three write the same text."""
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    for source, target, form in ((talker, orbax, "orbax"), (orbax, back, "hf")):
        ran = cli("convert", source, target, "--to", form)
        assert (ran.code, ran.out, ran.err) == (0, f"{target}\n", "")
    weights = "model.safetensors"
    assert (back / weights).read_bytes() == (talker / weights).read_bytes()
    words = ("--max-new-tokens", 4, "--json")
    texts = {
        json.loads(cli("generate", "capital", "--model", folder, *words).out)["text"]
        for folder in (talker, orbax, back)
    }
    assert len(texts) == 1
    assert json.loads(cli("info", orbax, "--json").out)["format"] == "Orbax"


def test_a_model_that_sees_there_and_back(cli, tmp_path):
    source, orbax, back = DATA / "g3_mm", tmp_path / "orbax", tmp_path / "back"
    assert cli("convert", source, orbax, "--to", "orbax").code == 0
    assert cli("convert", orbax, back, "--to", "hf").code == 0
    weights = "model.safetensors"
    assert (back / weights).read_bytes() == (source / weights).read_bytes()
    assert json.loads((back / "config.json").read_text())["model_type"] == "gemma3"


def test_text_only(cli, tmp_path):
    assert cli("convert", DATA / "g3_mm", tmp_path / "x", "--to", "hf", "--text-only").code == 0
    assert json.loads((tmp_path / "x" / "config.json").read_text())["model_type"] == "gemma3_text"


def test_a_tower_of_its_own_goes_with_a_gguf_file(refused, mute, tmp_path):
    words = (mute, tmp_path / "out", "--to", "hf", "--mmproj", __file__)
    said = refused("convert", *words)
    assert said == f"{__file__}: mmproj goes with a GGUF file, and {mute} is none"


def test_dtype(cli, talker, tmp_path):
    assert cli("convert", talker, tmp_path / "x", "--to", "hf", "--dtype", "bfloat16").code == 0
    assert json.loads(cli("info", tmp_path / "x", "--json").out)[
        "file_bytes_by_encoding"
    ].keys() == {"BF16"}


def test_target_in_the_way(refused, mute, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("precious")
    assert "not empty" in refused("convert", mute, tmp_path / "folder", "--to", "hf")
    assert (tmp_path / "folder" / "mine").read_text() == "precious"
    assert "a file is in the way" in refused(
        "convert", mute, tmp_path / "folder" / "mine", "--to", "orbax"
    )
    assert "parent folder" in refused("convert", mute, tmp_path / "a" / "b", "--to", "hf")


@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "no permission")]
)
def test_failing_disk_leaves_nothing(refused, mute, tmp_path, monkeypatch, form, number, message):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", fail)  # the last step
    assert message in refused("convert", mute, tmp_path / "new", "--to", form, code=1)
    assert list(tmp_path.iterdir()) == []


def test_too_large_for_the_disk(refused, mute, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(100, 90, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "the disk has 10 left" in refused("convert", mute, tmp_path / "new", "--to", "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["--to", "gguf"]])
def test_format_must_be_known(refused, mute, tmp_path, words):
    error = refused("convert", mute, tmp_path / "new", *words)
    assert "--to" in error and "hf" in error and "orbax" in error
