"""What is saved with `save` is what `load` gives again: weights, vocabulary, ends of answers."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from test_imports import ROOT

import gemma_jax as gj
from gemma_jax import Tokenizer

DIGITS = ROOT / "checkpoints" / "digits"
TEXT = "Which digit is left?"


@pytest.fixture(scope="module")
def digits():
    return gj.load(str(DIGITS))


def same(model, other):
    assert other.cfg == model.cfg
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("format", ["orbax", "hf"])
def test_a_folder_is_loaded_as_it_was_saved(digits, tmp_path, format):
    model, tok = digits
    again, vocabulary = gj.load(gj.save(model, tok, tmp_path / "mine", format=format))
    same(model, again)
    assert vocabulary.encode(TEXT, bos=True) == tok.encode(TEXT, bos=True)
    assert vocabulary.stop_ids == tok.stop_ids


@pytest.mark.parametrize("format", ["orbax", "hf"])
def test_stop_ids_of_a_users_own_are_kept(tmp_path, format):
    model, tok = tiny.model(tiny.gemma1(), "unrolled"), gj.load_tokenizer(DIGITS)
    tok = tok.with_stop_ids([7, 1], "me")
    gj.save(model, tok, tmp_path / "mine", format=format)
    again = gj.load_tokenizer(tmp_path / "mine")
    assert again.stop_ids == (1, 7) and again.stop_ids_from == "generation_config.json"


def test_a_vocabulary_may_have_any_name_or_none(tmp_path):
    content = (DIGITS / "tokenizer.model").read_bytes()
    shutil.copyfile(DIGITS / "tokenizer.model", tmp_path / "mine.model")
    model, expected = tiny.model(tiny.gemma1(), "unrolled"), gj.load_tokenizer(DIGITS).encode(TEXT)
    for i, tok in enumerate([
        Tokenizer.from_file(tmp_path / "mine.model"), Tokenizer.from_sentencepiece_bytes(content)
    ]):  # fmt: skip
        gj.save(model, tok, tmp_path / str(i))
        again, vocabulary = gj.load(tmp_path / str(i))
        same(model, again)
        assert vocabulary.encode(TEXT) == expected


def test_without_a_tokenizer_there_is_a_model_alone(tmp_path):
    model = tiny.model(tiny.gemma1(), "unrolled")
    gj.save(model, None, tmp_path / "mine")
    same(model, gj.load_model(tmp_path / "mine"))
    with pytest.raises(ValueError, match="no tokenizer found.*gemma_jax.save puts one.*load_model"):
        gj.load(tmp_path / "mine")


def test_mistakes_leave_nothing_behind(digits, tmp_path):
    model, tok = digits
    with pytest.raises(ValueError, match="format='gguf' must be 'orbax' or 'hf'"):
        gj.save(model, tok, tmp_path / "mine", format="gguf")
    with pytest.raises(ValueError, match="float32|int8|plain"):
        gj.save(gj.load_model(DIGITS, weights="int8"), tok, tmp_path / "mine", format="hf")
    assert not (tmp_path / "mine").exists()
