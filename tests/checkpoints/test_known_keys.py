"""Every key and tensor of a checkpoint is used, passed over for a reason, or refused by name."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_keys import CONFIG_KEYS, GENERAL_KEYS, GGUF_KEYS
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import DATA, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc
from gemma_checkpoints.gguf import config_keys as gguf_keys
from gemma_checkpoints.gguf.config import config_from_gguf
from gemma_checkpoints.gguf.header import read_gguf_header
from gemma_checkpoints.hf import config_keys as hf_keys
from gemma_checkpoints.hf.config import config_from_hf

WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
CONFIG = json.loads((DATA / "g3_text" / "config.json").read_text())
SEEING = json.loads((DATA / "g3_mm" / "config.json").read_text())


@pytest.mark.parametrize(("where", "kind"), CONFIG_KEYS)
def test_every_published_key_of_a_config_has_a_fate(where, kind):
    keys = CONFIG_KEYS[where, kind].split()
    assert [key for key in keys if not hf_keys.has_fate(kind, key)] == []


@pytest.mark.parametrize("arch", GGUF_KEYS)
def test_every_published_key_of_a_gguf_has_a_fate(arch):
    keys = [f"{arch}.{key}" for key in GGUF_KEYS[arch].split()] + GENERAL_KEYS
    assert [key for key in keys if not gguf_keys.has_fate(arch, key)] == []


def test_every_fate_has_its_reason_and_no_key_two():
    for kind, read in hf_keys.READ.items():
        others = [*hf_keys.UNREAD, *hf_keys.UNREAD_OF.get(kind, {}), *hf_keys.UNSET]
        assert not read & set(others) and len(set(others)) == len(others), kind
    for arch, read in gguf_keys.READ.items():
        others = [*gguf_keys.UNREAD_OF_MODEL, *gguf_keys.UNSET]
        assert not read & set(others) and len(set(others)) == len(others), arch
    reasons = [hf_keys.UNREAD, *hf_keys.UNREAD_OF.values(), hf_keys.UNREAD_ROPE, gguf_keys.UNREAD]
    assert all(why for table in (*reasons, gguf_keys.UNREAD_OF_MODEL) for why in table.values())


@settings(max_examples=40, deadline=None)
@given(keys=st.sets(WORDS, min_size=1, max_size=3), value=st.sampled_from([None, 0, True, "x", []]))
def test_unknown_keys_of_a_config_are_all_named(keys, value):
    unknown = sorted(key for key in keys if not hf_keys.has_fate("gemma3_text", key))
    if unknown:
        with pytest.raises(ValueError, match="unknown here") as caught:
            config_from_hf(CONFIG | dict.fromkeys(sorted(keys), value))
        assert ", ".join(unknown) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("inside", ["text_config", "vision_config"])
def test_unknown_keys_inside_are_named_with_their_place(inside):
    changed = SEEING | {inside: SEEING[inside] | {"mlp_bias": True}}
    with pytest.raises(ValueError, match=rf"{inside}\.mlp_bias: unknown here"):
        config_from_hf(changed)
    with pytest.raises(ValueError, match="^use_mla: unknown here"):
        config_from_hf(SEEING | {"use_mla": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, r"rope_parameters\.rope_theta: unknown here"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, r"rope_scaling\.msc"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is set"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is set"),
    ],
)
def test_keys_that_change_the_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(CONFIG | changes)


@pytest.mark.parametrize("where", ["", "text_config."])
def test_a_quantised_model_is_refused_wherever_it_says_so(where):
    quantised = {"quantization_config": {"bits": 4}}
    inner = {"text_config": SEEING["text_config"] | quantised}
    with pytest.raises(ValueError, match=rf"^{where}quantization_config is set"):
        config_from_hf(SEEING | (inner if where else quantised))


def test_copies_of_the_text_config_say_nothing_new():
    size = SEEING["text_config"]["hidden_size"]
    assert config_from_hf(SEEING | {"hidden_size": size}) == config_from_hf(SEEING)
    with pytest.raises(ValueError, match="^hidden_size: unknown here"):
        config_from_hf(SEEING | {"hidden_size": size + 1})


@settings(max_examples=40, deadline=None)
@given(keys=st.sets(WORDS, min_size=1, max_size=3), inside=st.booleans())
def test_unknown_keys_of_a_gguf_are_all_named(keys, inside, gguf_metadata):
    names = sorted(f"gemma3.{key}" if inside else f"{key}.x" for key in keys)
    unknown = [name for name in names if not gguf_keys.has_fate("gemma3", name)]
    if unknown:
        with pytest.raises(ValueError, match="unknown here") as caught:
            config_from_gguf(gguf_metadata | dict.fromkeys(names, 1), 96)
        assert ", ".join(unknown) in str(caught.value)


@pytest.fixture(scope="module")
def gguf_metadata(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, random_model(tiny("gemma3-4b")), "gemma3", plain)
    return read_gguf_header(path).metadata


@settings(max_examples=15, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=3))
def test_unknown_tensors_are_named(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = load_file(DATA / "g3_text" / "model.safetensors")
    name = "model.layers.0." + ".".join(words) + ".weight"
    save_file(tensors | {name: np.zeros(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(gc.CheckpointError) as caught:
        gc.load_weights(folder)
    assert f"{name.removeprefix('model.')} is surplus" in str(caught.value)


# Buffers of transformers 4.38 to 5.24 (`register_buffer`, `nn.Buffer`), as files spell them.
BUFFERS = """
    model.layers.0.self_attn.rotary_emb.inv_freq model.rotary_emb.inv_freq
    model.rotary_emb.original_inv_freq model.rotary_emb_local.inv_freq
    model.rotary_emb.full_attention_inv_freq model.rotary_emb.sliding_attention_inv_freq
    model.rotary_emb.full_attention_original_inv_freq model.embed_tokens.embed_scale
    language_model.model.rotary_emb.inv_freq model.language_model.rotary_emb_local.inv_freq
    model.language_model.embed_tokens.embed_scale rotary_emb.inv_freq
    model.layers.3.self_attn.rotary_emb.cos_cached model.layers.3.self_attn.rotary_emb.sin_cached
"""
BUFFERS_3N = """
    model.embed_tokens_per_layer.embed_scale model.per_layer_projection_scale
    model.per_layer_input_scale model.layers.1.altup.router_input_scale
    model.layers.2.self_attn.v_norm.weight model.rotary_emb.sliding_attention_original_inv_freq
"""
BUFFERS_MM = """
    vision_tower.vision_model.embeddings.position_ids
    model.vision_tower.vision_model.embeddings.position_ids
    model.vision_tower.embeddings.position_ids language_model.model.rotary_emb.inv_freq
"""


@pytest.mark.parametrize(
    ("family", "names"), [("g3_text", BUFFERS), ("g3n_text", BUFFERS_3N), ("g3_mm", BUFFERS_MM)]
)
def test_buffers_that_the_model_computes_are_passed_over(family, names, tmp_path):
    tensors = load_file(DATA / family / "model.safetensors")
    (tmp_path / "config.json").write_bytes((DATA / family / "config.json").read_bytes())
    for name in names.split():
        save_file(tensors | {name: np.zeros((1, 4), np.int64)}, tmp_path / "model.safetensors")
        assert gc.describe(tmp_path).num_params == gc.describe(DATA / family).num_params, name
