"""The decoder of a Gemma 3n that sees and hears, from its own folder (`data/g3n_mm`)."""

import json

import numpy as np
import pytest
from parity.goldens import DATA, assert_close, case
from safetensors.numpy import load_file

from gemma_checkpoints import load_weights, save_hf, save_orbax
from gemma_jax import forward

CAPTURES = ("embeddings", "layer_outputs", "final_norm")


@pytest.fixture(scope="module")
def model():
    return load_weights(DATA / "g3n_mm", dtype="float32", layout="scan")


def test_ids_of_images_and_sounds(model):
    """Ids that mark images and sounds are embedded as their towers' results are."""
    given, expected, tolerance = case("g3n_mm", "forward_text_only")
    ids = given["input_ids"].astype(np.int32)
    for vocabulary in model.cfg.modality_vocabularies:
        last = vocabulary.first_id + vocabulary.vocab_size
        assert ((ids >= vocabulary.first_id) & (ids < last)).any()
    out = forward(model, ids, capture=CAPTURES)
    for name, value in {"logits": out.logits, **out.captured}.items():
        assert_close(value, expected[name], tolerance[name])


def test_loaded_for_text_alone_it_is_the_same_until_such_an_id(model):
    given, _, tolerance = case("g3n_mm", "forward_text_only")
    ids = given["input_ids"].astype(np.int32)
    first = int((ids[0] >= model.cfg.modality_vocabularies[0].first_id).argmax())
    text = load_weights(DATA / "g3n_mm", dtype="float32", layout="scan", modalities=("text",))
    assert text.cfg.modality_vocabularies == ()
    ours, whole = forward(text, ids).logits, forward(model, ids).logits
    assert_close(ours[:, :first], whole[:, :first], tolerance["logits"])
    assert np.abs(ours - whole)[:, first].max() > 100 * tolerance["logits"]


def test_for_text_alone_it_comes_back_as_a_decoder_alone(tmp_path):
    source = DATA / "g3n_mm"
    model = load_weights(source, dtype=None, modalities=("text",))
    out = save_hf(model, tmp_path / "out", source=source)
    assert json.loads((out / "config.json").read_text())["model_type"] == "gemma3n_text"
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    for name, array in ours.items():
        stored = theirs[name.replace("model.", "model.language_model.", 1)]
        assert (array.view(np.uint16) == stored.view(np.uint16)).all(), name
    assert load_weights(out, dtype=None).cfg == model.cfg


def test_orbax_keeps_the_vocabularies(model, tmp_path):
    again = load_weights(save_orbax(model, tmp_path / "out"), dtype="float32")
    assert again.cfg == model.cfg
    ids = case("g3n_mm", "forward_text_only")[0]["input_ids"].astype(np.int32)
    assert_close(forward(again, ids).logits, forward(model, ids).logits, 1e-5)
