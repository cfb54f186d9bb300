"""Numbers of transformers' Gemma 4, text alone, float32, as in `test_gemma3_text.py`.

`data/g4_text` is made like E2B: per-layer embeddings, shared keys and values, wider feed-forwards
behind. `data/g4_keys_as_values` is made like the larger ones: global layers whose values come from
the keys, with a number of heads of their own. Both have global heads twice as wide as local ones,
of which a quarter turns.
"""

import numpy as np
import pytest
from marks import nightly
from parity.goldens import (
    DATA,
    assert_close,
    assert_continues,
    assert_gradient,
    case,
    loss_gradient,
)
from safetensors.numpy import load_file

from gemma_checkpoints import load_weights, save_hf
from gemma_jax import forward, init_cache, quantise
from gemma_jax.decoder.batch import Batch
from gemma_jax.weights.protocol import dense
from gemma_jax.weights.tree import map_params

FOLDERS = ("g4_text", "g4_keys_as_values")
CAPTURES = ("embeddings", "layer_outputs", "final_norm")


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    return request.param


@pytest.fixture(scope="module", params=["scan", *nightly("unrolled")])
def model(request, folder):
    return load_weights(DATA / folder, dtype="float32", layout=request.param)


def test_logits_and_the_stream_of_every_layer(model, folder):
    given, expected, tolerance = case(folder, "forward")
    out = forward(model, given["input_ids"].astype(np.int32), capture=CAPTURES)
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    for key in CAPTURES:
        assert out.captured[key].shape == expected[key].shape
        assert_close(out.captured[key], expected[key], tolerance[key])


@pytest.mark.parametrize("name", ["batch_left_pad", *nightly("batch_right_pad")])
def test_padded_batch(model, folder, name):
    given, expected, tolerance = case(folder, name)
    real = given["attention_mask"] == 1
    positions = np.where(real, given["position_ids"], -1).astype(np.int32)
    tokens = given["input_ids"].astype(np.int32)
    out = forward(model, Batch(tokens, positions), capture=("final_norm",))
    for key, value in {"logits": out.logits, **out.captured}.items():
        assert_close(value, expected[key], tolerance[key], real[..., None])


@pytest.mark.parametrize("name", ["generate", *nightly("generate_left_pad")])
def test_greedy_continuations(model, folder, name):
    """24 tokens behind up to 40, through rings of 6 slots."""
    assert_continues(model, folder, name)


@pytest.mark.parametrize("folder", ["g4_keys_as_values", *nightly("g4_text")])
def test_gradients(folder, tmp_path):
    model = load_weights(DATA / folder, dtype="float32")
    _, expected, tolerance = case(folder, "gradients")
    value, grads = loss_gradient(model, folder)
    assert_close(value, expected["loss"], tolerance["loss"])
    assert_gradient(grads, folder, tmp_path / "grads", least=12)
    for group in grads.blocks:  # transformers' buffers
        assert all(not np.any(block.layer_scale.scale[...]) for block in group)


@pytest.mark.parametrize("folder", ["g4_keys_as_values", *nightly("g4_text")])
def test_a_prompt_in_pieces_gives_what_it_gives_in_one(folder):
    """Rings of 6 slots and full caches, with heads of two sizes, token by token and in chunks."""
    model = load_weights(DATA / folder, dtype="float32")
    given, expected, tolerance = case(folder, "forward")
    ids = given["input_ids"].astype(np.int32)
    cache = init_cache(model.cfg, model.layer_groups, batch=1, max_len=64, dtype="float32")
    widths = {layer.k_BKSH.shape[-3:] for group in cache.layers for layer in group if layer}
    num_global = model.cfg.heads_of(model.cfg.layers[-1])[1]
    assert widths == {(2, 6, 16), (num_global, 64, 32)}
    for first, last in ((0, 11), (11, 12), (12, 13), (13, 40)):
        out = forward(model, ids[:, first:last], cache=cache)
        cache = out.cache
        assert_close(out.logits, expected["logits"][:, first:last], tolerance["logits"])


def test_the_table_on_the_host_gives_the_same_logits():
    ids = case("g4_text", "forward")[0]["input_ids"].astype(np.int32)
    here, host = (
        forward(load_weights(DATA / "g4_text", dtype="float32", per_layer_table=place), ids).logits
        for place in ("device", "host")
    )
    np.testing.assert_array_equal(here, host)


@pytest.mark.parametrize(
    "folder, storage",
    [
        ("g4_text", "int8"),
        *nightly(("g4_text", "int4:channel"), ("g4_keys_as_values", "int8")),
    ],
)
def test_narrow_weights_compute_what_their_numbers_say(folder, storage):
    """To rounding; the golden, whose weights are not rounded, is much farther away."""
    given, expected, _ = case(folder, "forward")
    ids = given["input_ids"].astype(np.int32)
    narrow = quantise(load_weights(DATA / folder, dtype="float32"), storage)
    logits = forward(narrow, ids).logits
    widened = map_params(narrow, lambda param: dense(param.get_value()))
    np.testing.assert_allclose(logits, forward(widened, ids).logits, atol=1e-5)
    error = np.abs(np.asarray(logits) - expected["logits"]).max()
    assert 2e-4 < error < (0.05 if storage == "int8" else 1)


def test_comes_back_from_an_export(folder, tmp_path):
    """Every tensor with its bits, and a config that is read as the same model."""
    model = load_weights(DATA / folder, dtype=None)
    again = load_weights(save_hf(model, tmp_path / "out"), dtype=None)
    assert again.cfg == model.cfg
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(DATA / folder / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all((ours[name].view(np.uint16) == theirs[name].view(np.uint16)).all() for name in ours)
