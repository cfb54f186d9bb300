"""A command line in this process, and tiny checkpoints to use it on."""

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import tiny
from flax import nnx
from safetensors.numpy import save_file

from gemma_checkpoints import save_hf
from gemma_jax import Gemma
from gemma_jax.cli.app import run

DATA = Path(__file__).parent.parent / "parity" / "data"
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
    """`cli(*words, stdin=b"")` runs a command line."""

    def call(*words, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
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
def talker(tmp_path_factory) -> Path:
    """A Hugging Face folder of a tiny random Gemma 3 with a tokenizer."""
    folder, model = tmp_path_factory.mktemp("talker") / "hf", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Räksmörgås: the capital of France is Paris.\n"] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "minloglevel": 2},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
    )
    cfg, rng = tiny.gemma3(layers=3, vocab_size=VOCABULARY), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Gemma(cfg, rngs=nnx.Rngs(0)))
    save_hf(
        jax.tree.map(lambda x: 0.3 * jax.numpy.array(rng.normal(size=x.shape), x.dtype), shapes),
        folder,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


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
