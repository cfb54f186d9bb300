"""A command line in this process, and tiny checkpoints to use it on."""

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_vocabulary
from parity.goldens import DATA
from safetensors.numpy import save_file

from gemma_checkpoints import save_hf
from gemma_jax import GemmaConfig, Image
from gemma_jax.cli.app import run
from gemma_jax.decoder.model import abstract_model

VOCABULARY = 320


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error of a command that failed as it should: one line, no traceback, no results."""
        assert self.code in (1, 2)
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.endswith("\n") and self.err.count("\n") == 1
        return self.err.removeprefix("error: ").rstrip()


@pytest.fixture
def cli(capsys, monkeypatch):
    """`cli(*words, stdin=b"")` runs a command line; with `terminal`, the user seems to type."""

    def call(*words, stdin: bytes = b"", terminal: bool = False) -> Ran:
        typed = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        typed.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", typed)
        capsys.readouterr()
        code = run([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(cli):
    """`refused(*words, code=2)` runs a command line that must fail, and returns its error."""

    def call(*words, code: int = 2, stdin: bytes = b"") -> str:
        ran = cli(*words, stdin=stdin)
        assert ran.code == code
        return ran.error

    return call


@pytest.fixture(scope="session")
def mute() -> Path:
    """The tiny Gemma 3 of the stored cases, which has no tokenizer."""
    return DATA / "g3_text"


@pytest.fixture(scope="session")
def vocabulary() -> bytes:
    """The `tokenizer.model` of `talker` and `seer`."""
    return tiny_vocabulary.train(VOCABULARY)


def write_model(folder: Path, cfg: GemmaConfig, vocabulary: bytes) -> Path:
    """A Hugging Face folder of a random model with a tokenizer."""
    shapes, rng = abstract_model(cfg), np.random.default_rng(0)
    save_hf(
        jax.tree.map(lambda x: 0.3 * jax.numpy.array(rng.normal(size=x.shape), x.dtype), shapes),
        folder,
    )
    (folder / "tokenizer.model").write_bytes(vocabulary)
    return folder


@pytest.fixture(scope="session")
def talker(tmp_path_factory, vocabulary) -> Path:
    """A tiny random Gemma 3 with a tokenizer."""
    cfg = tiny.gemma3(layers=3, vocab_size=VOCABULARY)
    return write_model(tmp_path_factory.mktemp("talker") / "tiny-it", cfg, vocabulary)


@pytest.fixture(scope="session")
def seer(tmp_path_factory, vocabulary) -> Path:
    """A tiny random Gemma 3 with a tokenizer and a vision tower; its image token has no piece."""
    vision = tiny.vision(num_layers=1, image_token=VOCABULARY, start_token=6, end_token=7)
    cfg = tiny.gemma3(layers=1, window=512, vocab_size=VOCABULARY, vision=vision)
    return write_model(tmp_path_factory.mktemp("seer") / "tiny-it", cfg, vocabulary)


@pytest.fixture
def picture(tmp_path):
    """`picture(name, height=.., width=.., level=..)` writes an image of one grey."""

    def write(name: str, height: int = 300, width: int = 300, level: int = 0) -> Path:
        path = tmp_path / name
        Image(np.full((height, width, 3), level, np.uint8)).to_pil().save(path)
        return path

    return write


@pytest.fixture
def copy(mute, tmp_path) -> Path:
    """A copy of `mute` to spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(mute / name, folder)
    return folder


@pytest.fixture
def stored(tmp_path):
    """`stored(name=values)` writes an inputs file."""

    def write(**arrays) -> Path:
        path = tmp_path / "inputs.safetensors"
        save_file({name: np.asarray(values) for name, values in arrays.items()}, path)
        return path

    return write
