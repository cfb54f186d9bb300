"""Hugging Face folders of quantised weights, as compressed-tensors and bitsandbytes made them.

`data/quant/NAME` was written by compressed-tensors 0.20.1 (w4a16, w4a16_asym, w8a8) or bitsandbytes
0.50.2 (nf4 with quantised scales, nf4_plain) from a random Gemma 3 of two layers; what they make of
some of its matrices again, in float32, lies beside it.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stand_in import Kept, keep
from tiny_checkpoints import DATA

import gemma_checkpoints as gc
from gemma_checkpoints.hf.names import short_name
from gemma_jax import forward
from gemma_jax.weights.tree import flat_params

QUANT = DATA / "quant"
NAMES = ["w4a16", "w4a16_asym", "w8a8", "nf4", "nf4_plain"]
LAYER = "model.layers.1.self_attn.k_proj"


def silent(line):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_floats_and_blocks_are_what_their_own_library_makes_of_them(name):
    source = gc.open_source(QUANT / name)
    expected = load_file(QUANT / f"{name}.safetensors")
    assert len(expected) == 3
    for theirs, wide in expected.items():
        short = short_name(theirs)
        np.testing.assert_array_equal(source.read(short), wide)
        np.testing.assert_array_equal(source.read_blocks(short).values(), wide)
        some = slice(16, 40)
        np.testing.assert_array_equal(source.read(short, some), wide[some])
        np.testing.assert_array_equal(source.read_blocks(short, some).values(), wide[some])


@pytest.mark.parametrize("name", NAMES)
def test_kept_and_widened_models_say_the_same(name):
    tokens = np.arange(12).reshape(1, 12) * 7
    wide = gc.load_weights(QUANT / name, dtype="float32", layout="unrolled", notify=silent)
    kept = gc.load_weights(
        QUANT / name, dtype="float32", layout="unrolled", keep=keep, notify=silent
    )
    values = [param.get_value() for param in flat_params(kept).values()]
    matrices = [value for value in values if isinstance(value, Kept)]
    assert len(matrices) == 14
    assert all((w.matrix.table is not None) == name.startswith("nf4") for w in matrices)
    logits, expected = (forward(model, tokens).logits for model in (kept, wide))
    np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_rounded_activations_are_told_of():
    told = []
    gc.load_weights(QUANT / "w8a8", notify=told.append)
    assert told == [
        "w8a8: made for activations that are rounded to int8 as they come; here weights alone are "
        "quantised"
    ]
    gc.load_weights(QUANT / "w4a16", notify=told.append)
    assert len(told) == 1


def test_it_is_saved_as_a_plain_folder(tmp_path):
    model = gc.load_weights(QUANT / "w4a16", dtype="float32")
    saved = gc.save_hf(model, tmp_path / "plain", source=QUANT / "w4a16")
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    names = load_file(saved / "model.safetensors")
    assert f"{LAYER}.weight" in names and not any("packed" in name for name in names)
    assert gc.describe(saved).config == gc.describe(QUANT / "w4a16").config


@pytest.fixture
def edited(tmp_path):
    """`edited(name, change, tensors)`: a copy with another `quantization_config`, or tensors."""

    def edit(name, change=None, tensors=None):
        folder = tmp_path / "model"
        shutil.copytree(QUANT / name, folder)
        config = json.loads((folder / "config.json").read_text())
        if change is not None:
            change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            arrays = load_file(folder / "model.safetensors")
            tensors(arrays)
            save_file(arrays, folder / "model.safetensors")
        return folder

    return edit


def group(said):
    return said["config_groups"]["group_0"]


def of_weights(**values):
    return lambda said: group(said)["weights"].update(values)


CONFIGS = [
    ("w4a16", lambda said: said.update(quant_method="gptq"), "quant_method is 'gptq'"),
    ("w4a16", lambda said: said.update(surprise=1), "quantization_config.surprise is unknown"),
    ("w4a16", lambda said: said.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is"),
    ("w4a16", lambda said: said.update(quantization_status="frozen"), "status is 'frozen'"),
    ("w4a16", lambda said: said.update(config_groups={}), "config_groups is missing"),
    ("w4a16", lambda said: said.update(format="float-quantized"), "no FP8"),
    ("w4a16", lambda said: said.update(ignore=["re:.*k_proj"]), "quantization_config.ignore"),
    ("w4a16", lambda said: group(said).update(targets=["re:.*mlp"]), "no target of"),
    ("w4a16", lambda said: group(said).update(surprise=1), "group_0.surprise is unknown"),
    ("w4a16", of_weights(type="float"), "no FP8"),
    ("w4a16", of_weights(num_bits=3), "weights.num_bits is 3; expected 4 or 8"),
    ("w4a16", of_weights(actorder="group"), "g_idx"),
    ("w4a16", of_weights(group_size=48), "groups of 48 do not divide rows of 64"),
    ("w4a16", of_weights(group_size=64), r"weight_scale has shape \[64, 2\]; expected \[64, 1\]"),
    ("w4a16", of_weights(strategy="block"), "strategy is 'block'"),
    ("w4a16", of_weights(symmetric=False), "weight_zero_point is missing"),
    ("w4a16", of_weights(block_structure=[8, 8]), "weights.block_structure is"),
    ("w8a8", lambda said: group(said)["input_activations"].update(dynamic=False), "stored scales"),
    ("w8a8", lambda said: group(said).update(output_activations={}), "output_activations are set"),
    ("nf4", lambda said: said.update(load_in_8bit=True), "load_in_8bit is True"),
    ("nf4", lambda said: said.update(bnb_4bit_quant_storage="bfloat16"), "quant_storage is 'bfl"),
    ("nf4", lambda said: said.update(surprise=1), "quantization_config.surprise is unknown"),
]


@pytest.mark.parametrize(("name", "change", "message"), CONFIGS)
def test_what_a_config_says_is_used_or_refused(name, change, message, edited):
    with pytest.raises(gc.CheckpointError, match=message):
        gc.open_source(edited(name, change))


def drop(*names):
    def change(arrays):
        for name in names:
            del arrays[name]

    return change


def put(name, make):
    return lambda arrays: arrays.update({name: make(arrays.get(name))})


TENSORS = [
    ("w4a16", drop(f"{LAYER}.weight_packed"), f"{LAYER}: weight_packed is missing"),
    ("w4a16", drop(f"{LAYER}.weight_scale"), "weight_packed belongs to no layer"),
    ("w4a16", put(f"{LAYER}.weight_packed", lambda x: x[:, :-1].copy()), "weight_packed has shape"),
    ("w4a16", put(f"{LAYER}.weight_shape", lambda x: -x), "weight_shape is"),
    ("w4a16", put(f"{LAYER}.weight_g_idx", lambda x: np.zeros(64, np.int32)), "weight_g_idx belo"),
    ("w8a8", put(f"{LAYER}.weight", lambda x: x.astype(np.int32)), "weight is stored as I32"),
    ("w8a8", put(f"{LAYER}.input_scale", lambda x: np.ones(1, np.float32)), "input_scale belongs"),
    ("w4a16_asym", put(f"{LAYER}.weight_zero_point", lambda x: x[:-1].copy()), "zero_point has sh"),
    ("nf4", drop(f"{LAYER}.weight.absmax"), "absmax is missing"),
    ("nf4", put(f"{LAYER}.weight.absmax", lambda x: x[:-1].copy()), "absmax is U8"),
    ("nf4", put(f"{LAYER}.weight.quant_map", lambda x: x * np.nan), "quant_map holds values"),
    ("nf4", drop(f"{LAYER}.weight.quant_state.bitsandbytes__nf4"), "belongs to no matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_tensors_that_do_not_fit_are_named(name, change, message, edited):
    with pytest.raises(gc.CheckpointError, match=message):
        gc.open_source(edited(name, tensors=change))


def test_broken_scales_are_named(edited):
    name = f"{LAYER}.weight.nested_absmax"
    folder = edited("nf4", tensors=put(name, lambda x: x * np.nan))
    with pytest.raises(gc.CheckpointError, match=r"layers.1.self_attn.k_proj.weight: \d+ scales"):
        gc.load_weights(folder, keep=keep)


def test_a_folder_that_says_it_is_quantised_and_is_not(edited):
    def plain(arrays):
        for name in [name for name in arrays if "_proj" in name]:
            del arrays[name]

    with pytest.raises(gc.CheckpointError, match="no tensor is called"):
        gc.open_source(edited("w4a16", tensors=plain))
