"""Gemma 1, Gemma 2 and VaultGemma against transformers 5.24, on tiny random models.

`make_goldens.py write FOLDER --config ...` made `data/gemma1` (seed 1), `data/gemma2` (seed 2) and
`data/vaultgemma` (seed 0). The classes of the last two have no fused attention in transformers, so
their noise is the distance to float64 alone.
"""

import json

import jax
import jax.numpy as jnp
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

from gemma_checkpoints import load_weights, save_hf
from gemma_jax import Runtime, forward
from gemma_jax.decoder.batch import Batch

FOLDERS = ("gemma1", "gemma2", "vaultgemma")
CAPTURES = ("embeddings", "layer_outputs", "final_norm")


@pytest.fixture(scope="module", params=["scan", *nightly("unrolled")])
def models(request):
    return {
        folder: load_weights(DATA / folder, dtype="float32", layout=request.param)
        for folder in FOLDERS
    }


def test_what_their_configs_say(models):
    gemma1, gemma2, vault = (models[folder].cfg for folder in FOLDERS)
    assert [cfg.post_norms for cfg in (gemma1, gemma2, vault)] == [False, True, False]
    assert not any(cfg.qk_norm for cfg in (gemma1, gemma2, vault))
    assert {spec.kind for spec in gemma1.layers} == {"global"} and gemma1.final_soft_cap is None
    for cfg in (gemma2, vault):
        assert (cfg.attn_soft_cap, cfg.final_soft_cap, cfg.query_pre_attn_scalar) == (5, 10, 16)
        assert [spec.window for spec in cfg.layers] == [8, None, 8, None]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_and_every_layer(folder, implementation):
    runtime = Runtime(attention_impl=implementation)
    model = load_weights(DATA / folder, dtype="float32", runtime=runtime)
    given, expected, tolerance = case(folder, "forward")
    out = forward(model, given["input_ids"].astype(np.int32), capture=CAPTURES)
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    for key in CAPTURES:
        assert_close(out.captured[key], expected[key], tolerance[key])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(models, side):
    given, expected, tolerance = case("gemma1", f"batch_{side}_pad")
    real = given["attention_mask"] == 1
    positions_BT = np.where(real, given["position_ids"], -1).astype(np.int32)
    out = forward(models["gemma1"], Batch(given["input_ids"].astype(np.int32), positions_BT))
    assert_close(out.logits, expected["logits"], tolerance["logits"], real[..., None])


@pytest.mark.parametrize(
    "folder, name", [("gemma1", "generate_left_pad"), *((folder, "generate") for folder in FOLDERS)]
)
def test_greedy_continuations(models, folder, name):
    assert_continues(models[folder], folder, name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_gradients(models, folder, tmp_path):
    _, expected, tolerance = case(folder, "gradients")
    value, grads = loss_gradient(models[folder], folder)
    assert_close(value, expected["loss"], tolerance["loss"])
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    assert_close(norm, expected["grad_global_norm"], tolerance["grad_global_norm"])
    assert_gradient(grads, folder, tmp_path / "grads", least=4)


@pytest.mark.parametrize("folder", FOLDERS)
def test_written_and_read_again(models, folder, tmp_path):
    save_hf(models[folder], tmp_path)
    said, was = (
        json.loads((place / "config.json").read_text()) for place in (tmp_path, DATA / folder)
    )
    assert [said[k] for k in ("model_type", "architectures")] == [
        was[k] for k in ("model_type", "architectures")
    ]
    again, first = (
        load_weights(place, dtype="float32", layout="unrolled")
        for place in (tmp_path, DATA / folder)
    )
    assert again.cfg == first.cfg
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)
