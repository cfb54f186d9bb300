"""Folders of rounded weights that are written: as compressed-tensors stores them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from stand_in import Kept, keep
from tiny_checkpoints import DATA, by_name, random_model, tiny

import gemma_checkpoints as gc
from gemma_checkpoints.hf.compressed_out import pack, rounded
from gemma_checkpoints.hf.compressed_tensors import unpack
from gemma_jax import forward
from gemma_jax.weights.tree import flat_params

GROUPS = load_file(DATA / "quant" / "groups.safetensors")
ROUNDED = ["attn.q.w", "attn.k.w", "attn.v.w", "attn.o.w", "ffn.gate.w", "ffn.up.w", "ffn.down.w"]


@pytest.mark.parametrize("group", ["g32", "g128", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_are_those_of_compressed_tensors(bits, group):
    size = None if group == "channel" else int(group[1:])
    codes, scale = rounded(GROUPS["in.weight"], bits, size)
    expected = {k: GROUPS[f"out.int{bits}_{group}.{k}"] for k in ("values", "scales", "near_tie")}
    np.testing.assert_array_max_ulp(scale, expected["scales"], maxulp=1)
    off = np.abs(codes.astype(np.int32) - expected["values"])
    assert not off[expected["near_tie"] == 0].any() and off.max() <= 1


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(bits):
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = np.random.default_rng(0).integers(low, high, (5, 64)).astype(np.int8)
    raised = unpack(pack(codes, bits), bits)
    np.testing.assert_array_equal(raised.astype(np.int32) + low, codes)


@pytest.mark.parametrize(
    ("weights", "bits", "group"),
    [("int4", 4, 32), ("int4:128", 4, 128), ("int8", 8, 256), ("int8:32", 8, 32)],
)
def test_a_model_comes_back_rounded(weights, bits, group, tmp_path):
    model = random_model(tiny("gemma3-1b", num_layers=2))
    saved = gc.save_hf(model, tmp_path / "out", weights=weights)
    before, after = by_name(model), by_name(gc.load_weights(saved))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if not name.endswith(tuple(ROUNDED)):
            np.testing.assert_array_equal(after[name], value, err_msg=name)
            continue
        inputs = 2 if ".o." in name else 1
        wide = value.reshape(-1, int(np.prod(value.shape[-inputs:])))
        codes, scale = rounded(wide, bits, group)
        size = wide.shape[1] if weights == "int8" else group
        expected = codes.reshape(*scale.shape, -1)[..., :size] * scale[..., None]
        np.testing.assert_array_equal(after[name].reshape(expected.shape), expected, err_msg=name)


def test_it_is_kept_as_codes(tmp_path):
    saved = gc.save_hf(
        random_model(tiny("gemma3-1b", num_layers=2)), tmp_path / "out", weights="int4"
    )
    source = gc.open_source(saved)
    assert source.tensors["layers.0.mlp.up_proj.weight"].encoding == "int4 in groups of 32"
    kept = gc.load_weights(source.path, layout="unrolled", keep=keep)
    values = [param.get_value() for param in flat_params(kept).values()]
    assert sum(isinstance(value, Kept) for value in values) == 14
    tokens = np.arange(9)[None]
    wide = gc.load_weights(saved, layout="unrolled")
    logits = [forward(model, tokens).logits for model in (kept, wide)]
    np.testing.assert_allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("name", ["g3_mm", "g3n_mm", "g4_text"])
def test_towers_and_what_gemma3n_has_beside_stay_plain(name, tmp_path):
    model = gc.load_weights(DATA / name)
    width = min(spec.d_ff for spec in model.cfg.layers)
    group = np.gcd.reduce([model.cfg.d_model, width, model.cfg.num_heads * model.cfg.head_dim, 32])
    saved = gc.save_hf(model, tmp_path / "out", weights=f"int8:{group}", source=DATA / name)
    said = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert "lm_head" in said["ignore"]
    assert ("re:.*vision_tower.*" in said["ignore"]) == (name != "g4_text")
    assert ("re:.*altup.*" in said["ignore"]) == (name == "g3n_mm")
    assert ("re:.*per_layer_input_gate" in said["ignore"]) == (name != "g3_mm")
    names = [n for n in load_file(saved / "model.safetensors") if n.endswith("weight_packed")]
    assert len(names) > 5
    assert all("self_attn" in n or ".mlp." in n for n in names)
    assert not any("tower" in n for n in names)
    assert gc.load_weights(saved).cfg == model.cfg


def test_a_folder_of_compressed_tensors_is_rounded_anew(tmp_path):
    """Its own scales go with its plain weights; the config says what the new ones are."""
    given = DATA / "quant" / "w4a16"
    saved = gc.save_hf(gc.load_weights(given), tmp_path / "out", weights="int8", source=given)
    said = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    first, second = by_name(gc.load_weights(given)), by_name(gc.load_weights(saved))
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=0.01, err_msg=name)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("int3", "'int3' is no storage of a folder; expected int4, int8"),
        ("int4:0", "'int4:0' is no storage"),
        ("bfloat16", "'bfloat16' is no storage"),
    ],
)
def test_other_storages_are_refused(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gc.save_hf(random_model(tiny("gemma3-1b", 1)), tmp_path / "out", weights=weights)
    assert not list(tmp_path.iterdir())


def test_groups_that_do_not_divide_are_refused(tmp_path):
    model = random_model(tiny("gemma3-1b", 1))
    with pytest.raises(gc.CheckpointError, match="groups of 96 do not divide rows of 256"):
        gc.save_hf(model, tmp_path / "out", weights="int4:96")
    assert not list(tmp_path.iterdir())
