"""`config.json` in all its spellings."""

import json
from dataclasses import replace

import pytest
from tiny_checkpoints import DATA

from gemma_checkpoints.hf.config import config_from_hf, text_config
from gemma_checkpoints.hf.config_out import config_to_hf
from gemma_jax.encoder_config import VisionConfig
from gemma_jax.presets import PRESETS, preset

TOWER = {
    "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
    "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
    "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
# The published files, without the keys that say nothing about the architecture.
PUBLISHED = {
    "gemma-2b": {
        "model_type": "gemma", "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None,
        "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192,
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
    },
    "gemma2-27b": {
        "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "intermediate_size": 36864,
        "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46,
        "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "vocab_size": 256000,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_size": 1152,
        "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gemma3-4b": {
        "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000,
        "image_token_index": 262144, "mm_tokens_per_image": 256, "vision_config": TOWER,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "gemma3-27b": {
        "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000,
        "image_token_index": 262144, "mm_tokens_per_image": 256, "vision_config": TOWER,
        "text_config": {
            "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504,
            "model_type": "gemma3_text", "num_attention_heads": 32, "num_hidden_layers": 62,
            "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name):
    assert config_from_hf(PUBLISHED[name]) == preset(name)


def test_both_spellings_say_the_same():
    new, old = (
        json.loads((DATA / "g3_text" / f"config{s}.json").read_text()) for s in ("", "_legacy")
    )
    assert "rope_parameters" in new and "rope_parameters" not in old
    assert config_from_hf(new) == config_from_hf(old)
    assert config_from_hf(new).layers[5].rope_scale == 8


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spelling", ["both", "new", "published"])
def test_there_and_back(name, spelling):
    # What makes vectors of texts stands in files of its own.
    hf, cfg = config_to_hf(preset(name)), replace(preset(name), text_embedding=None)
    unread = {
        "both": (),
        "new": ("rope_theta", "rope_local_base_freq", "rope_scaling"),
        "published": ("rope_parameters", "layer_types"),
    }
    text = hf.get("text_config", hf)
    if name.startswith("gemma4"):  # published when there was one spelling
        unread["published"] = ()
    for key in unread[spelling]:
        text.pop(key, None)
    assert config_from_hf(json.loads(json.dumps(hf))) == cfg


def test_caps_are_those_that_the_classes_apply():
    gemma3 = PUBLISHED["gemma3-1b"] | {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    assert config_from_hf(gemma3).attn_soft_cap is None, "Gemma3Attention ignores it"
    assert config_from_hf(gemma3).final_soft_cap == 30.0, "Gemma3ForCausalLM applies it"
    multimodal = {"model_type": "gemma3", "text_config": gemma3, "vision_config": TOWER}
    assert config_from_hf(multimodal).final_soft_cap is None, "...ForConditionalGeneration does not"
    assert text_config(multimodal)["final_logit_softcapping"] is None, (
        "so the export must not either"
    )


def test_keys_that_are_missing_mean_the_defaults():
    """Those of `SiglipVisionConfig` and `Gemma3Config`."""
    raw = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 49,
        "vision_config": {"vision_use_head": False},
    }
    assert config_from_hf(raw).vision == VisionConfig(
        d_tower=768, d_ff=3_072, num_layers=12, num_heads=12, image_size=224, patch_size=16,
        num_soft_tokens=49, image_token=262_144, start_token=255_999, end_token=256_000,
    )  # fmt: skip


def test_ids_by_their_newer_names():
    old = {"image_token_index": 7, "boi_token_index": 8, "eoi_token_index": 9}
    new = {key.replace("index", "id"): value for key, value in old.items()}
    bare = {k: v for k, v in PUBLISHED["gemma3-4b"].items() if k not in old}
    vision = config_from_hf(bare | new).vision
    assert vision == config_from_hf(bare | old).vision
    assert (vision.image_token, vision.start_token, vision.end_token) == (7, 8, 9)


def test_shieldgemma_is_a_gemma():
    raw = PUBLISHED["gemma3-4b"] | {"model_type": "shieldgemma2"}
    assert config_from_hf(raw) == preset("gemma3-4b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model'.*'siglip_vision"),
        ({"vision_use_head": True}, "vision_use_head is True, which is not supported; expected F"),
        ({"vision_use_head": ...}, "vision_use_head is True by default"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"hidden_size": "wide"}, "vision_config.hidden_size must be a positive whole number"),
        ({"image_size": [896, 896]}, "vision_config.image_size must be a positive whole number"),
        ({"num_hidden_layers": 10**9}, "vision_config.num_hidden_layers 1000000000 is beyond"),
        ({"num_attention_heads": 7}, "d_tower=1152 must be a multiple of num_heads=7"),
        ({"image_size": 900}, "image_size=900 must be a multiple of patch_size=14"),
        ({"layer_norm_eps": None}, "vision_config.layer_norm_eps must be a positive number"),
    ],
)
def test_other_towers_are_refused(changes, message):
    tower = {key: value for key, value in (TOWER | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        config_from_hf(PUBLISHED["gemma3-4b"] | {"vision_config": tower})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "vision_config is missing: a 'gemma3' model has one"),
        ({"vision_config": 27}, "vision_config must be an object, got 27"),
        ({"mm_tokens_per_image": 200}, "num_soft_tokens=200 must be a square"),
        ({"mm_tokens_per_image": None}, "mm_tokens_per_image must be a positive whole number"),
        ({"image_token_index": "<image>"}, "image_token_index must be a positive whole number"),
    ],
)
def test_broken_ways_into_the_text_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(PUBLISHED["gemma3-4b"] | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": []}, "model_type"),
        (
            {"hidden_activation": "mish"},
            "hidden_activation 'mish' is not supported; expected 'gelu_",
        ),
        ({"hidden_activation": ["silu"]}, r"hidden_activation \['silu'\] is not supported"),
        ({"hidden_act": "silu"}, "hidden_act 'silu' has no effect .* gemma3_text reads hidden_act"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"use_bidirectional_attention": 1}, "use_bidirectional_attention must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false, got 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type 'default' or 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number, got None"),
        ({"rope_scaling": 8}, "rope_scaling must be an object"),
        ({"rope_theta": "1e6"}, "rope_theta must be a positive number"),
        ({"layer_types": ["full_attention"]}, "layer_types must hold"),
        ({"layer_types": ["chunked"] * 26}, "layer_types must hold"),
        ({"sliding_window": None}, "sliding_window must be a positive whole number"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        ({"_sliding_window_pattern": 3}, "_sliding_window_pattern 3 has no effect in transformers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is beyond"),
        ({"hidden_size": "big"}, "hidden_size must be"),
        ({"head_dim": True}, "head_dim must be"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads=3"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
    ],
)
def test_what_is_unknown_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(PUBLISHED["gemma3-1b"] | changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("gelu", "gelu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
    ],
)
def test_activations_by_their_names(name, expected):
    """`ACT2FN` of transformers 5.24; every class but Gemma 1's reads `hidden_activation`."""
    for family in ("gemma2", "gemma3_text", "gemma3n_text"):
        raw = {"model_type": family, "hidden_activation": name}
        assert config_from_hf(raw).activation == expected
        inside = {"model_type": "gemma3n", "text_config": raw}
        if family == "gemma3n_text":
            assert config_from_hf(inside).activation == expected


def test_activations_of_gemma_1():
    """`GemmaMLP` reads `hidden_act`, and `GemmaConfig` takes "gelu" for the tanh approximation."""
    for act, expected in (("gelu", "gelu_tanh"), ("gelu_python", "gelu"), ("silu", "silu")):
        raw = {"model_type": "gemma", "hidden_act": act}
        assert config_from_hf(raw).activation == expected
        assert config_from_hf(raw | {"hidden_activation": act}).activation == expected
    both = {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "silu"}
    with pytest.raises(ValueError, match="hidden_activation 'silu' has no effect.*gemma reads"):
        config_from_hf(both)


@pytest.mark.parametrize("name", ["gemma-2b", "gemma2-2b", "gemma3-1b", "gemma3-4b", "gemma3n-e2b"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu"])
def test_activations_there_and_back(name, activation):
    cfg = replace(preset(name), activation=activation)
    assert config_from_hf(config_to_hf(cfg)) == cfg


def test_only_what_transformers_has_is_exported():
    cfg = preset("gemma3-1b")
    with pytest.raises(ValueError, match="fits Gemma 3 alone, but not attn_soft_cap=50.0$"):
        config_to_hf(replace(cfg, attn_soft_cap=50.0))
    with pytest.raises(ValueError, match="fits Gemma 3 alone, but not post_norms=False$"):
        config_to_hf(replace(cfg, post_norms=False))
    bare = replace(cfg, qk_norm=False, post_norms=False, query_pre_attn_scalar=8)
    with pytest.raises(ValueError, match="have one rope for all layers$"):
        config_to_hf(bare)
    with pytest.raises(ValueError, match="without soft caps"):
        config_to_hf(replace(preset("gemma3-4b"), final_soft_cap=30.0))
    with pytest.raises(ValueError, match="without soft caps"):
        config_to_hf(replace(preset("gemma2-2b"), vision=preset("gemma3-4b").vision))
    wider = (replace(cfg.layers[0], d_ff=8), *cfg.layers[1:])
    with pytest.raises(ValueError, match="differ"):
        config_to_hf(replace(cfg, layers=wider))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [0.0]), (10, [0.0] * 10), (11, [0.95] * 10 + [0.0]), (35, [0.95] * 10 + [0.0] * 25)],
)
@pytest.mark.parametrize("given", [{}, {"activation_sparsity_pattern": None}])
def test_gemma_3n_is_sparse_by_default_if_it_has_more_than_ten_layers(layers, expected, given):
    """`Gemma3nTextConfig.__post_init__` of transformers 5.24."""
    raw = {"model_type": "gemma3n_text", "num_hidden_layers": layers, "num_kv_shared_layers": 0}
    assert [spec.sparsity for spec in config_from_hf(raw | given).layers] == expected
    inside = {"model_type": "gemma3n", "text_config": raw | given}
    assert [spec.sparsity for spec in config_from_hf(inside).layers] == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma", ["global"] * 6),
        ("gemma2", ["local", "global"] * 3),
        ("gemma3_text", ["local"] * 5 + ["global"]),
        ("gemma3n_text", ["local"] * 4 + ["global", "local"]),
    ],
)
def test_defaults_hold_at_any_depth(family, expected):
    """`layer_types` of the classes of transformers 5.24 for six layers; a depth alone is enough."""
    raw = {"model_type": family, "num_hidden_layers": 6, "num_kv_shared_layers": 0}
    raw = raw if family == "gemma3n_text" else raw | {"num_kv_shared_layers": ...}
    cfg = config_from_hf({key: value for key, value in raw.items() if value is not ...})
    assert [spec.kind for spec in cfg.layers] == expected
    thetas = {spec.kind: spec.rope_theta for spec in cfg.layers}
    wide = 1e6 if "3" in family else 1e4
    assert thetas == {"global": wide} | ({"local": 1e4} if "local" in expected else {})


def test_what_is_not_wanted_may_be_absent():
    """Of images, that is: the decoder stands in `text_config`, or has the class's defaults."""
    text = PUBLISHED["gemma3-4b"]["text_config"]
    bare = {"model_type": "gemma3", "text_config": text}
    decoder = replace(preset("gemma3-4b"), vision=None)
    assert config_from_hf(bare, modalities=()) == decoder
    assert (
        config_from_hf(bare | {"vision_config": {"model_type": "clip"}}, modalities=()) == decoder
    )
    with pytest.raises(ValueError, match="vision_config is missing"):
        config_from_hf(bare)


def test_the_reader_is_found_by_its_old_name():
    from gemma_checkpoints import hf_config

    assert hf_config.config_from_hf is config_from_hf


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_relatives_with_an_encoder_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"model_type '{kind}' is not supported: it has an enc"):
        config_from_hf({"model_type": kind})
