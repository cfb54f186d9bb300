"""The decoder of a Gemma 3n that sees and hears, from its own folder (`data/g3n_mm`)."""

import json

import numpy as np
from parity.goldens import DATA, assert_close, case
from safetensors.numpy import load_file

from gemma_checkpoints import load_model, save_hf
from gemma_jax import forward

CAPTURES = ("embeddings", "layer_outputs", "final_norm")


def test_text_alone():
    """Ids of the towers' own vocabularies are embedded beside them; no token before sees those."""
    model = load_model(DATA / "g3n_mm", dtype="float32", layout="scan")
    given, expected, tolerance = case("g3n_mm", "forward_text_only")
    foreign = given["input_ids"][0] >= model.cfg.per_layer.vocab_size
    ids = given["input_ids"][:, : foreign.argmax()].astype(np.int32)
    assert ids.shape[1] == 11
    out = forward(model, ids, capture=CAPTURES)
    for name, value in {"logits": out.logits, **out.captured}.items():
        assert_close(value, expected[name][..., :11, :], tolerance[name])


def test_comes_back_as_a_decoder_alone(tmp_path):
    source = DATA / "g3n_mm"
    model = load_model(source, dtype=None, modalities=("text",))
    out = save_hf(model, tmp_path / "out", source=source)
    assert json.loads((out / "config.json").read_text())["model_type"] == "gemma3n_text"
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    for name, array in ours.items():
        stored = theirs[name.replace("model.", "model.language_model.", 1)]
        assert (array.view(np.uint16) == stored.view(np.uint16)).all(), name
    assert load_model(out, dtype=None).cfg == model.cfg
