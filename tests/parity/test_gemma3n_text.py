"""Numbers of transformers' Gemma 3n, float32, as in `test_gemma3_text.py`.

`data/g3n_e2b_like` is a MatFormer slice of `data/g3n_text`: fewer layers, half the width.
"""

from dataclasses import replace

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
from safetensors.numpy import load_file

from gemma_checkpoints import load_weights, save_hf
from gemma_jax import Runtime, forward
from gemma_jax.decoder.batch import Batch

CAPTURES = ("embeddings", "per_layer_inputs", "layer_outputs", "final_norm")


@pytest.fixture(scope="module", params=["scan", *nightly("unrolled")])
def model(request):
    return load_weights(DATA / "g3n_text", dtype="float32", layout=request.param)


def test_logits_and_every_stream_of_every_layer(model):
    given, expected, tolerance = case("g3n_text", "forward")
    out = forward(model, given["input_ids"].astype(np.int32), capture=CAPTURES)
    assert (given["input_ids"] >= model.cfg.per_layer.vocab_size).sum() == 2
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    for key in CAPTURES:
        assert out.captured[key].shape == expected[key].shape
        assert_close(out.captured[key], expected[key], tolerance[key])


def test_a_slice():
    model = load_weights(DATA / "g3n_e2b_like", dtype="float32")
    given, expected, tolerance = case("g3n_e2b_like", "forward")
    out = forward(model, given["input_ids"].astype(np.int32), capture=("final_norm",))
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    assert_close(out.captured["final_norm"], expected["final_norm"], tolerance["final_norm"])


@pytest.mark.parametrize("name", ["batch_left_pad", "batch_right_pad"])
def test_padded_batch(model, name):
    given, expected, tolerance = case("g3n_text", name)
    real = given["attention_mask"] == 1
    positions = np.where(real, given["position_ids"], -1).astype(np.int32)
    tokens = given["input_ids"].astype(np.int32)
    out = forward(model, Batch(tokens, positions), capture=("final_norm",))
    for key, value in {"logits": out.logits, **out.captured}.items():
        assert_close(value, expected[key], tolerance[key], real[..., None])


@pytest.mark.parametrize(
    "folder, name",
    [
        ("g3n_e2b_like", "generate"),
        *nightly(("g3n_text", "generate"), ("g3n_text", "generate_left_pad")),
    ],
)
def test_greedy_continuations(folder, name):
    model = load_weights(DATA / folder, dtype="float32", layout="scan")
    assert_continues(model, folder, name)


@pytest.mark.nightly
def test_gradients(model, tmp_path):
    _, expected, tolerance = case("g3n_text", "gradients")
    value, grads = loss_gradient(model, "g3n_text")
    assert_close(value, expected["loss"], tolerance["loss"])
    assert_gradient(grads, "g3n_text", tmp_path / "grads", least=13)


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["unrolled"], indirect=True)
def test_norm_of_the_gradient(model):
    """In float64: what float32 rounds depends on the processor, and can exceed this tolerance."""
    _, expected, tolerance = case("g3n_text", "gradients")
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model)
        numerics = replace(model.runtime.numerics, norm_in_float32=False, softmax_in_float32=False)
        exact.runtime = replace(
            model.runtime,
            dtype=jnp.dtype("float64"),
            numerics=numerics,
            attention_impl="reference",
        )
        _, gradient = loss_gradient(exact, "g3n_text")
        table = gradient.per_layer.table.get_value()
        # Ids beyond the per-layer table read its row 0, which torch never trains (`padding_idx`).
        assert np.abs(table[0]).max() > 0
        trained = [g for g in jax.tree.leaves(gradient) if g is not table]
        norm = np.sqrt(sum(np.square(np.asarray(g)).sum() for g in [*trained, table[1:]]))
    assert_close(norm, expected["grad_global_norm"], tolerance["grad_global_norm"])


def test_bfloat16_is_as_good_as_the_reference():
    given, expected, _ = case("g3n_text", "forward_bf16")
    reference = np.abs(expected["logits_bf16"] - expected["logits_fp32"]).mean()
    runtime = Runtime(dtype=jnp.dtype("bfloat16"))
    model = load_weights(DATA / "g3n_text", dtype="bfloat16", runtime=runtime)
    logits = np.asarray(forward(model, given["input_ids"].astype(np.int32)).logits)
    assert np.abs(logits - expected["logits_fp32"]).mean() <= 1.5 * reference


def test_the_published_spelling_of_the_config_means_the_same(tmp_path):
    for name in ("config.json", "config_legacy.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((DATA / "g3n_text" / name).read_bytes())
        weights = (DATA / "g3n_text" / "model.safetensors").read_bytes()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    new, old = (load_weights(tmp_path / n).cfg for n in ("config.json", "config_legacy.json"))
    assert new == old


def test_comes_back_from_an_export(tmp_path):
    """All tensors but the unused keys and values of layers that share those of others."""
    model = load_weights(DATA / "g3n_text", dtype=None)
    again = load_weights(save_hf(model, tmp_path / "out"), dtype=None)
    assert again.cfg == model.cfg
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(DATA / "g3n_text" / "model.safetensors")
    left_out = {
        f"model.layers.{i}.self_attn.{name}.weight"
        for i, spec in enumerate(model.cfg.layers)
        if spec.kv == "shared"
        for name in ("k_proj", "v_proj", "k_norm")
    }
    assert set(theirs) - set(ours) == left_out and set(ours) <= set(theirs)
    assert all((ours[name].view(np.uint16) == theirs[name].view(np.uint16)).all() for name in ours)
