"""Whole folders of Gemma 3n: its towers and the vocabularies that stay with them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import DATA, by_name

import gemma_checkpoints as gc
from gemma_checkpoints.hf.config import config_from_hf
from gemma_checkpoints.hf.config_out import config_to_hf
from gemma_checkpoints.params import params_by_part
from gemma_jax import matformer
from gemma_jax.presets import preset

SOURCE = DATA / "g3n_mm"
CONFIG = json.loads((SOURCE / "config.json").read_text())
# The published files, without the keys that say nothing about the architecture.
PUBLISHED = {
    "model_type": "gemma3n", "audio_soft_tokens_per_image": 188, "audio_token_id": 262273,
    "boa_token_id": 256000, "boi_token_id": 255999, "eoa_token_id": 262272, "eoi_token_id": 262144,
    "image_token_id": 262145, "vision_soft_tokens_per_image": 256,
    "audio_config": {
        "conf_attention_chunk_size": 12, "conf_attention_context_left": 13,
        "conf_attention_context_right": 0, "conf_attention_logit_cap": 50.0,
        "conf_conv_kernel_size": 5, "conf_num_attention_heads": 8, "conf_num_hidden_layers": 12,
        "conf_reduction_factor": 4, "conf_residual_weight": 0.5, "gradient_clipping": 10000000000.0,
        "hidden_size": 1536, "input_feat_size": 128, "model_type": "gemma3n_audio",
        "rms_norm_eps": 1e-06, "sscp_conv_channel_size": [128, 32],
        "sscp_conv_group_norm_eps": 0.001, "sscp_conv_kernel_size": [[3, 3], [3, 3]],
        "sscp_conv_stride_size": [[2, 2], [2, 2]], "vocab_offset": 262272, "vocab_size": 128,
    },
    "text_config": {
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20, "altup_active_idx": 0,
        "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_num_inputs": 4,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_size": 2048,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 256,
        "intermediate_size": [8192] * 30, "laurel_rank": 64,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 6,
        "max_position_embeddings": 32768, "model_type": "gemma3n_text", "num_attention_heads": 8,
        "num_hidden_layers": 30, "num_key_value_heads": 2, "num_kv_shared_layers": 10,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "vocab_size": 262400,
        "vocab_size_per_layer_input": 262144,
    },
    "vision_config": {
        "architecture": "mobilenetv5_300m_enc", "do_pooling": False, "hidden_size": 2048,
        "label_names": ["LABEL_0", "LABEL_1"], "model_args": None, "model_type": "gemma3n_vision",
        "num_classes": 2, "rms_norm_eps": 1e-06, "vocab_offset": 262144, "vocab_size": 128,
    },
}  # fmt: skip
E4B = {
    "num_hidden_layers": 35, "num_kv_shared_layers": 15, "intermediate_size": [16384] * 35,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}  # fmt: skip


def changed(raw, part=None, **keys):
    """`raw` with other keys in it, or in a part of it."""
    return raw | ({part: raw[part] | keys} if part else keys)


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3n-e2b", "gemma3n-e4b"])
def test_published_files(name):
    raw = PUBLISHED if name.endswith("e2b") else changed(PUBLISHED, "text_config", **E4B)
    assert config_from_hf(raw) == preset(name)
    sizes = {k: v for k, v in raw["text_config"].items() if raw is PUBLISHED or k not in E4B}
    bare = {"model_type": "gemma3n", "text_config": sizes}
    assert config_from_hf(bare) == preset(name), "the rest are the defaults of the classes"


@pytest.mark.parametrize(
    ("name", "total"), [("gemma3n-e2b", 5_439_438_272), ("gemma3n-e4b", 7_849_978_192)]
)
def test_parameters_are_as_many_as_in_the_published_files(name, total):
    """Which hold keys, values and a norm for each layer that shares those of others.

    Without them there are 7,818,517,072 in E4B, as in `Gemma3nForConditionalGeneration` of
    transformers 5.24: 294,126,912 in its vision tower, 681,348,640 in its audio tower.
    """
    cfg = preset(name)
    parts = params_by_part(cfg)
    assert (parts["vision.tower"], parts["audio.tower"]) == (294_126_912, 681_348_640)
    assert (parts["vision.projector"], parts["audio.projector"]) == (4_460_544, 3_345_408)
    shared = sum(spec.kv == "shared" for spec in cfg.layers)
    unused = shared * (2 * cfg.num_kv_heads * cfg.head_dim * cfg.d_model + cfg.head_dim)
    assert sum(parts.values()) + unused == total


def test_both_spellings_there_and_back():
    for raw in (PUBLISHED, CONFIG):
        cfg = config_from_hf(raw)
        assert config_from_hf(json.loads(json.dumps(config_to_hf(cfg)))) == cfg
    assert config_to_hf(config_from_hf(PUBLISHED))["vision_config"]["model_args"] is None
    told = config_to_hf(config_from_hf(CONFIG))["vision_config"]["model_args"]
    assert told["arch_def"][0] == CONFIG["vision_config"]["model_args"]["arch_def"][0]


@pytest.mark.parametrize(
    ("part", "keys", "message"),
    [
        ("vision_config", {"architecture": "resnet50"}, "architecture 'resnet50' is not supported"),
        ("vision_config", {"architecture": "mobilenetv5_base"}, "'mobilenetv5_base' is not suppo"),
        ("vision_config", {"model_type": "siglip"}, "model_type is 'siglip'; expected 'gemma3n_v"),
        ("vision_config", {"model_args": {"drop_rate": 0.1}}, "model_args.drop_rate: unknown here"),
        ("vision_config", {"model_args": {"arch_def": ["er"]}}, "arch_def must list blocks by"),
        ("vision_config", {"model_args": {"arch_def": [["cn_r1_k3"]]}}, "arch_def: .*block 'cn'"),
        ("vision_config", {"model_args": {"num_features": 64}}, "num_features 64 is not hidden_s"),
        ("vision_config", {"model_args": {"msfa_output_resolution": 8}}, "gives 8 x 8"),
        ("vision_config", {"hidden_size": "wide"}, "vision_config.hidden_size must be a positive"),
        ("vision_config", {"mlp_bias": True}, "vision_config.mlp_bias: unknown here"),
        ("vision_config", {"vocab_size": 200}, "images ends at id 262344, behind"),
        ("vision_config", {"vocab_offset": 3}, "image_token_id 262145 must be an id of its voca"),
        ("audio_config", {"vocab_offset": 262300}, "audio_token_id 262273 must be an id of its"),
        ("audio_config", {"conf_attention_context_right": 2}, "context_right is 2, .* expected 0"),
        ("audio_config", {"sscp_conv_stride_size": [[2, 2], [1, 1]]}, "stride_size is .* not supp"),
        ("audio_config", {"sscp_conv_kernel_size": [[3, 3], [5, 5]]}, "two squares of one size"),
        ("audio_config", {"sscp_conv_kernel_size": 3}, "two squares of one size"),
        ("audio_config", {"sscp_conv_channel_size": [32]}, "channel_size must be two numbers"),
        ("audio_config", {"conf_num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is bey"),
        ("audio_config", {"conf_attention_logit_cap": 0}, "logit_cap must be a positive number"),
        ("audio_config", {"conf_num_attention_heads": 7}, "d_tower=1536 must be even and a multi"),
        ("audio_config", {"conf_new": 1}, "audio_config.conf_new: unknown here"),
        (None, {"vision_soft_tokens_per_image": 255}, "_per_image is 255, but the tower gives 16"),
        (None, {"audio_token_id": 7}, "audio_token_id 7 must be an id of its vocabulary, 262272"),
        (None, {"image_token_id": None}, "image_token_id must be a positive whole number"),
        (None, {"video_token_id": 3}, "video_token_id: unknown here"),
    ],
)
def test_what_the_towers_here_cannot_be_is_refused(part, keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_from_hf(changed(PUBLISHED, part, **keys))
    assert len(str(caught.value).splitlines()) == 1


def test_how_attention_is_grouped_changes_nothing():
    assert config_from_hf(changed(PUBLISHED, "audio_config", conf_attention_chunk_size=7)) == (
        config_from_hf(PUBLISHED)
    )


def test_only_what_transformers_has_is_exported():
    cfg = config_from_hf(PUBLISHED)
    images, sounds = cfg.modality_vocabularies
    deaf = replace(cfg, audio=None, modality_vocabularies=(images,))
    with pytest.raises(ValueError, match="with MobileNetV5 and an audio tower, or with neither"):
        config_to_hf(deaf)
    with pytest.raises(ValueError, match="no other fusion_expansion"):
        config_to_hf(replace(cfg, vision=replace(cfg.vision, fusion_expansion=3.0)))
    with pytest.raises(ValueError, match="that of images first"):
        config_to_hf(replace(cfg, modality_vocabularies=(sounds, images)))
    with pytest.raises(ValueError, match="are one number for transformers"):
        config_to_hf(replace(cfg, audio=replace(cfg.audio, norm_eps=1e-5)))


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    return gc.load_weights(SOURCE, dtype="float32")


@pytest.mark.parametrize(
    "modalities", [("text",), ("text", "image"), ("text", "audio"), ("text", "image", "audio")]
)
def test_a_vocabulary_stays_with_its_modality(whole, modalities):
    model = gc.load_weights(SOURCE, dtype="float32", modalities=modalities)
    kept = [("image", 0), ("audio", 1)]
    wanted = [whole.cfg.modality_vocabularies[i] for name, i in kept if name in modalities]
    assert list(model.cfg.modality_vocabularies) == wanted
    assert (model.cfg.vision is not None) == ("image" in modalities) == (model.vision is not None)
    assert (model.cfg.audio is not None) == ("audio" in modalities) == (model.audio is not None)
    expected = by_name(whole)
    for name, array in by_name(model).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.fixture
def folder(tmp_path):
    """A writable copy; `folder(**changes)` changes its config, `drop` leaves tensors out."""

    def copy(*, drop=None, add=(), **changes):
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(CONFIG | changes))
        tensors = load_file(SOURCE / "model.safetensors")
        kept = {k: v for k, v in tensors.items() if drop is None or drop not in k}
        save_file(
            kept | {name: np.zeros(3, np.float32) for name in add}, target / "model.safetensors"
        )
        return target

    return copy


def test_what_is_not_wanted_may_be_absent(folder):
    for drop, wanted in (("vision", ("text", "audio")), ("audio", ("text", "image"))):
        source = folder(drop=drop)
        assert gc.describe(source, modalities=wanted).num_params
        with pytest.raises(gc.CheckpointError, match=f"{drop}_tower.* is missing"):
            gc.describe(source)


def test_what_is_not_wanted_may_be_spoilt(folder):
    source = folder(audio_config=CONFIG["audio_config"] | {"conf_attention_context_right": 1})
    with pytest.raises(gc.CheckpointError, match=r'1.*; modalities=\("text", "image"\) does with'):
        gc.load_weights(source)
    assert gc.describe(source, modalities=("text", "image")).config.audio is None
    with pytest.raises(gc.CheckpointError, match="context_right is 1"):
        gc.describe(source, modalities=("text", "audio"))
    source = folder(vision_config={"architecture": "vit"}, audio_config=[])
    with pytest.raises(gc.CheckpointError, match=r'modalities=\("text",\) does without'):
        gc.describe(source)
    assert gc.describe(source, modalities=("text",)).config.vocab_size == 216


def test_a_model_without_a_tower_cannot_be_asked_for_it():
    for source, reads in ((DATA / "g3_mm", "text and image"), (DATA / "g3n_text", "text alone")):
        message = f"this model reads {reads}: it has no audio tower; leave 'audio' out of modalit"
        with pytest.raises(gc.CheckpointError, match=message):
            gc.describe(source, modalities=("text", "audio"))
    with pytest.raises(gc.CheckpointError, match="sounds need the Hugging Face folder"):
        gc.describe(DATA / "quant" / "g3n_q4_0.gguf", modalities=("text", "audio"))


def test_buffers_are_passed_over_and_strangers_named(folder):
    inside = "model.audio_tower.conformer.0.attention.attn."
    add = [inside + "q_scale", inside + "relative_position_embedding.inv_timescales",
           inside + "local_causal_valid_mask", inside + "softcap",
           "model.audio_tower.conformer.1.ffw_layer_start.gradient_clipping",
           "model.embed_audio.embedding_post_projection_norm.weight"]  # fmt: skip
    assert gc.describe(folder(add=add)).num_params == gc.describe(SOURCE).num_params
    for name in ("audio_tower.new.weight", "vision_tower.timm_model.new", "embed_audio.new"):
        with pytest.raises(gc.CheckpointError, match=f"{name} is surplus"):
            gc.describe(folder(add=[f"model.{name}"]))


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_round_trip_is_the_same_file(layout, tmp_path):
    out = gc.save_hf(gc.load_weights(SOURCE, layout=layout), tmp_path / "out", source=SOURCE)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (SOURCE / name).read_bytes()


def test_without_the_source_it_is_spelled_as_in_published_files(tmp_path):
    model = gc.load_weights(SOURCE)
    out = gc.save_hf(model, tmp_path / "out")
    assert gc.load_weights(out).cfg == model.cfg
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, SOURCE))
    assert ours.keys() == theirs.keys()
    assert all((ours[name].view(np.uint16) == theirs[name].view(np.uint16)).all() for name in ours)
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == ["Gemma3nForConditionalGeneration"]


def test_orbax_keeps_all_and_gives_parts(whole, tmp_path):
    out = gc.save_orbax(whole, tmp_path / "out")
    assert gc.describe(out).config == whole.cfg
    expected = by_name(whole)
    for name, array in by_name(gc.load_weights(out, modalities=("text", "audio"))).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_one_tower_alone_fits_our_folders_only(tmp_path):
    model = gc.load_weights(SOURCE, modalities=("text", "audio"))
    with pytest.raises(gc.CheckpointError, match="or with neither; save_orbax keeps it"):
        gc.save_hf(model, tmp_path / "hf")
    assert gc.load_weights(gc.save_orbax(model, tmp_path / "ours")).cfg == model.cfg


def test_slices_keep_the_towers(tmp_path):
    model = gc.load_weights(SOURCE, layout="unrolled")
    small = matformer.slice(model, matformer.Slice(ffn_widths=48))
    assert (small.cfg.vision, small.cfg.audio) == (model.cfg.vision, model.cfg.audio)
    out = gc.load_weights(gc.save_hf(small, tmp_path / "small", source=SOURCE))
    assert out.cfg == small.cfg and out.cfg.layers[0].d_ff == 48
    before, after = by_name(model), by_name(out)
    towers = [name for name in after if not name.startswith("blocks.")]
    assert all(np.array_equal(before[name], after[name]) for name in towers)
    assert len([name for name in towers if name.startswith("audio.")]) > 40


# --- preprocessor_config.json and processor_config.json -------------------------------------------

IMAGES = {
    "crop_size": None, "data_format": "channels_first", "default_to_square": False, "device": None,
    "do_center_crop": None, "do_convert_rgb": None, "do_normalize": False, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessorFast", "image_seq_length": 4, "resample": 2,
    "rescale_factor": 0.00392156862745098, "size": {"height": 768, "width": 768},
}  # fmt: skip
SOUNDS = {
    "dither": 0.0, "feature_extractor_type": "Gemma3nAudioFeatureExtractor", "feature_size": 16,
    "fft_length": 1024, "fft_overdrive": True, "frame_length": 512, "hop_length": 160,
    "input_scale_factor": 1.0, "max_frequency": 7600.0, "mel_floor": 1e-05, "min_frequency": 125.0,
    "padding_side": "right", "padding_value": 0.0, "per_bin_mean": None, "per_bin_stddev": None,
    "preemphasis": 0.97, "preemphasis_htk_flavor": True, "processor_class": "Gemma3nProcessor",
    "return_attention_mask": False, "sampling_rate": 16000,
}  # fmt: skip
LENGTHS = {"audio_seq_length": 9, "image_seq_length": 4, "processor_class": "Gemma3nProcessor"}


def write(folder, inputs=None, processor=None):
    for name, content in (("preprocessor_config", inputs), ("processor_config", processor)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def beside(tmp_path):
    """`beside(inputs, processor)`: the stored model with these files beside it."""

    def make(inputs=None, processor=None):
        target = tmp_path / f"beside{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copyfile(SOURCE / name, target / name)
        return write(target, inputs, processor)

    return make


def test_published_files_of_processors_are_the_defaults(beside):
    expected = gc.describe(SOURCE).config
    for inputs, processor in (
        (IMAGES | SOUNDS, LENGTHS),
        (None, LENGTHS | {"image_processor": IMAGES, "feature_extractor": SOUNDS}),
        (IMAGES, {"feature_extractor": SOUNDS}),
        ({}, {}),
    ):
        assert gc.describe(beside(inputs, processor)).config == expected


def test_settings_are_read(beside):
    size = {"height": 64, "width": 64}
    sounds = {"sampling_rate": 8_000, "max_frequency": 3_800.0, "frame_length_ms": 16,
              "fft_overdrive": False, "preemphasis": 0.0, "mel_floor": 1e-3}  # fmt: skip
    cfg = gc.describe(beside({"do_normalize": True, "size": size, "resample": 3} | sounds)).config
    images = cfg.vision.images
    assert (cfg.vision.image_size, images.resample) == (64, "bicubic")
    assert (images.mean, images.std) == ((0.5,) * 3, (0.5,) * 3)
    heard = cfg.audio.sounds
    assert (heard.sampling_rate, heard.frame_length, heard.hop_length) == (8_000, 128, 80)
    assert (heard.fft_length, heard.preemphasis, heard.mel_floor) == (128, 0.0, 1e-3)


def test_the_defaults_of_the_class_hold_in_a_file_that_speaks_of_images(beside):
    cfg = gc.describe(beside({"do_normalize": False})).config
    assert (cfg.vision.image_size, cfg.vision.images.resample) == (224, "bicubic")


@pytest.mark.parametrize(
    ("modality", "keys", "message"),
    [
        ("image", {"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' is not one"),
        ("image", {"size": {"shortest_edge": 768}}, "must be a height and a width"),
        ("image", {"size": {"height": 768, "width": 512}}, "the tower reads squares"),
        ("image", {"size": {"height": 100, "width": 100}}, "image_size=100 must be a multiple of"),
        ("image", {"image_seq_length": 256}, "image_seq_length 256 is not that of the tower, 4"),
        ("audio", {"feature_size": 80}, "feature_size 80 is not that of the tower, 16"),
        ("audio", {"feature_extractor_type": "WhisperFeatureExtractor"}, "'Whisper.* is not Gemma"),
        ("audio", {"frame_length": 400}, "frame_length 400 has no effect in transformers"),
        ("audio", {"fft_length": 512}, "fft_length 512 has no effect .* makes it 1024"),
        ("audio", {"sampling_rate": 0}, "sampling_rate must be a positive whole number"),
        ("audio", {"max_frequency": 9_000.0}, "must ascend, up to half of sampling_rate=16000"),
        (None, {"dither": 0.1}, "dither is 0.1, which is not supported"),
        (None, {"per_bin_mean": [0.0] * 16}, "per_bin_mean is .* not supported"),
        (None, {"do_pan_and_scan": True}, "do_pan_and_scan is True, which is not supported"),
        (None, {"normalize_loudness": True}, "'normalize_loudness' is not known here"),
    ],
)
def test_settings_that_cannot_be_done_are_refused(beside, modality, keys, message):
    """Only for those who want the modality, where the key says which it is."""
    source = beside(IMAGES | SOUNDS | keys)
    with pytest.raises(gc.CheckpointError, match=f"preprocessor_config.json: .*{message}"):
        gc.describe(source)
    left = [one for one in ("image", "audio") if modality not in (one, None)]
    assert gc.describe(source, modalities=("text", *left)).config.vocab_size == 216


def test_settings_come_back(beside, tmp_path):
    inputs = IMAGES | SOUNDS | {"size": {"height": 96, "width": 96}, "sampling_rate": 16_000}
    source = beside(inputs, LENGTHS)
    model = gc.load_weights(source)
    out = gc.save_hf(model, tmp_path / "copy", source=source)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    out = gc.save_hf(model, tmp_path / "own")
    assert gc.describe(out).config == model.cfg, "without the source the files are ours"
    raw = json.loads((out / "preprocessor_config.json").read_text())
    assert raw["feature_extractor_type"] == "Gemma3nAudioFeatureExtractor"
    stale = gc.save_hf(model, tmp_path / "stale", source=SOURCE)
    assert gc.describe(stale).config == model.cfg, "those of the source do not say it"
    plain = gc.save_hf(gc.load_weights(SOURCE), tmp_path / "plain", source=source)
    assert gc.describe(plain).config == gc.describe(SOURCE).config
