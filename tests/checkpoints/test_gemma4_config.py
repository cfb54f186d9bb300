"""Gemma 4's `config.json` in its spellings, and folders whose towers are left alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import DATA

import gemma_checkpoints as gc
from gemma_checkpoints.hf.config import config_from_hf
from gemma_checkpoints.hf.config_out import config_to_hf
from gemma_jax import forward
from gemma_jax.presets import preset

TINY = json.loads((DATA / "g4_text" / "config.json").read_text())
KEYS = json.loads((DATA / "g4_keys_as_values" / "config.json").read_text())


def kinds(layers, period):
    return [f"{'sliding' if (i + 1) % period else 'full'}_attention" for i in range(layers)]


def text_of_e2b():
    """The text config of the published folder, by the keys that say what it is."""
    return {
        "model_type": "gemma4_text", "hidden_size": 1536, "intermediate_size": 6144,
        "num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 1,
        "num_global_key_value_heads": None, "head_dim": 256, "global_head_dim": 512,
        "num_kv_shared_layers": 20, "use_double_wide_mlp": True, "layer_types": kinds(35, 5),
        "final_logit_softcapping": 30.0, "attention_k_eq_v": False, "enable_moe_block": False,
    }  # fmt: skip


def test_the_text_of_a_published_folder_is_the_preset():
    raw = {"model_type": "gemma4", "text_config": text_of_e2b(), "vision_config": {"a": 1}}
    assert config_from_hf(raw, modalities=()) == preset("gemma4-e2b")
    assert config_from_hf(raw["text_config"]) == preset("gemma4-e2b")
    assert config_from_hf(raw | {"vision_config": None, "audio_config": None}).vision is None
    for modality in ("image", "audio"):
        part = {"image": "vision_config", "audio": "audio_config"}[modality]
        with pytest.raises(ValueError, match=f"{part}: the {modality} tower of Gemma 4 is not"):
            config_from_hf(raw | {part: {}}, modalities=(modality,))


def test_what_transformers_writes_and_what_was_published_say_the_same():
    """5.24 writes heads by the number of the layer."""
    published = {**TINY, "global_head_dim": 32}
    del published["per_layer_config"]
    assert config_from_hf(published) == config_from_hf(TINY)
    published = {**KEYS, "global_head_dim": 32, "num_global_key_value_heads": 1}
    del published["per_layer_config"]
    assert config_from_hf(published) == config_from_hf(KEYS)
    assert config_from_hf(KEYS).layers[5].values == "keys"


def test_a_number_of_global_heads_counts_with_values_from_keys_alone():
    published = {**KEYS, "num_global_key_value_heads": 1, "attention_k_eq_v": False}
    del published["per_layer_config"]
    cfg = config_from_hf(published)
    assert {cfg.heads_of(spec)[1] for spec in cfg.layers} == {2}


def test_the_last_layer_is_global_whatever_the_file_says():
    types = ["sliding_attention"] * 6
    cfg = config_from_hf(
        {"model_type": "gemma4_text", "num_hidden_layers": 6, "layer_types": types}
    )
    assert [spec.kind for spec in cfg.layers] == ["local"] * 5 + ["global"]
    assert cfg.layers[5].rotary_share == 0.25 and cfg.heads_of(cfg.layers[5]) == (512, 4)


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-e4b", "tiny-gemma4"])
def test_presets_there_and_back(name):
    cfg = preset(name)
    assert config_from_hf(config_to_hf(cfg)) == cfg


def test_values_from_keys_there_and_back():
    cfg = config_from_hf(KEYS)
    out = config_to_hf(cfg)
    assert (out["num_global_key_value_heads"], out["attention_k_eq_v"]) == (1, True)
    assert config_from_hf(out) == cfg and cfg.per_layer is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_moe_block": True}, "enable_moe_block is set: mixtures of experts are not supp"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not supp"),
        ({"per_layer_config": {"4": {"sliding_window": 3}}}, "per_layer_config.4.sliding_w"),
        ({"per_layer_config": {"10": {}}}, "per_layer_config.10 is not supported; .* 0 to 9"),
        ({"num_kv_shared_layers": 10}, "no .* layer before them has keys and values to share"),
        ({"experts": 3}, "experts: unknown here"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "or 'proportional'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(TINY | changes)


def test_bidirectional_soft_tokens_change_nothing_for_text():
    assert config_from_hf(TINY | {"use_bidirectional_attention": "vision"}) == config_from_hf(TINY)


def test_the_decoder_of_a_folder_with_towers(tmp_path):
    tensors = load_file(DATA / "g4_text" / "model.safetensors")
    inner = {
        name.replace("model.", "model.language_model.", 1): array for name, array in tensors.items()
    }
    one = next(iter(tensors.values()))[:1]
    towers = ("vision_tower.encoder.w", "audio_tower.w", "embed_vision.w", "embed_audio.w")
    unused = "model.language_model.layers.9.self_attn.v_proj.weight"  # it shares another's
    save_file(inner | dict.fromkeys([*(f"model.{t}" for t in towers), unused], one),
              tmp_path / "model.safetensors")  # fmt: skip
    raw = {"model_type": "gemma4", "text_config": TINY, "vision_config": {}, "audio_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(gc.CheckpointError, match=r'not supported; .*modalities=\("text",\) does'):
        gc.load_weights(tmp_path)
    decoder = gc.load_weights(tmp_path, dtype="float32", modalities=("text",))
    alone = gc.load_weights(DATA / "g4_text", dtype="float32")
    ids = np.arange(4, 16)[None]
    assert decoder.cfg == alone.cfg
    np.testing.assert_array_equal(forward(decoder, ids).logits, forward(alone, ids).logits)
    again = gc.save_hf(decoder, tmp_path / "decoder", source=tmp_path)
    saved = json.loads((again / "config.json").read_text())
    assert saved["model_type"] == "gemma4_text" and gc.load_weights(again).cfg == decoder.cfg


def test_gguf_files_are_refused_by_name(tmp_path):
    with pytest.raises(gc.CheckpointError, match="GGUF files of Gemma 4 are not written here"):
        gc.save_gguf(
            gc.load_weights(DATA / "g4_text"), tmp_path / "a.gguf", source=DATA / "g4_text"
        )
    with pytest.raises(ValueError, match="general.architecture 'gemma4' is not supported"):
        gc.gguf.config.config_from_gguf({"general.architecture": "gemma4"}, 300)
