"""Files beside the weights: each of them is used, known to be irrelevant, or refused by name."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import vision
from tiny_checkpoints import DATA

import gemma_checkpoints as gc
from gemma_checkpoints import companions, generation_config
from gemma_checkpoints.companions import fate
from gemma_checkpoints.hf import feature_extractor, processor_config
from gemma_jax import Image, PanAndScan, Sampling, load_sampling
from gemma_jax.encoder_config import RESAMPLING, ImageProcessing
from gemma_jax.multimodal.image_prompt import image_modality
from gemma_jax.vision.images import preprocess

SOURCE = DATA / "g3_mm"


def beside(folder, **files):
    """The stored model that sees, with these files beside it."""
    folder.mkdir(exist_ok=True)
    for path in (*SOURCE.glob("*.safetensors"), SOURCE / "config.json"):
        if path.name in ("model.safetensors", "config.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# --- which files there may be --------------------------------------------------------------------

PUBLISHED = """.gitattributes README.md added_tokens.json chat_template.json chat_template.jinja
config.json generation_config.json model-00001-of-00002.safetensors model.safetensors
model.safetensors.index.json preprocessor_config.json processor_config.json special_tokens_map.json
tokenizer.json tokenizer.model tokenizer_config.json USAGE_POLICY.md gemma-2b.gguf notebook.ipynb
training_args.bin optimizer.pt rng_state.pth scheduler.pt trainer_state.json LICENSE merges.txt
pytorch_model.bin pytorch_model.bin.index.json modeling_gemma.py all_results.json""".split()


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_published_models_are_no_obstacle(name):
    assert not companions.name_in(name, companions.REFUSED)
    assert companions.name_in(name, companions.USED) == (fate(name) == "used")


@pytest.mark.parametrize("name", companions.REFUSED)
def test_files_that_change_the_model_are_refused_by_name(name, tmp_path):
    name = name.replace("*", "safetensors")
    folder = beside(tmp_path / "model")
    (folder / name).write_bytes(b"")
    with pytest.raises(gc.CheckpointError, match=name):
        gc.describe(folder)


def test_an_adapter_alone_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(gc.CheckpointError, match="adapter_config.json: an adapter"):
        gc.describe(tmp_path)


@given(st.text("abcxyz_-.0", min_size=1, max_size=20))
def test_any_name_has_a_fate(name):
    assert fate(name)


def test_no_name_has_two_fates():
    assert not [name for name in companions.USED if companions.name_in(name, companions.REFUSED)]
    for module in (generation_config, processor_config, feature_extractor):
        keys = [*module.USED, *module.IRRELEVANT, *module.NEUTRAL]
        assert len(keys) == len(set(keys))


# --- generation_config.json ----------------------------------------------------------------------

SAYINGS = [
    # google/gemma-3-4b-it and google/gemma-2-2b-it
    (
        {"bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": True,
         "eos_token_id": [1, 106], "pad_token_id": 0, "top_k": 64, "top_p": 0.95,
         "transformers_version": "4.50.0.dev0"},
        (1, 106), Sampling(temperature=1.0, top_k=64, top_p=0.95),
    ),
    (
        {"_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid",
         "eos_token_id": [107, 1], "pad_token_id": 0, "transformers_version": "4.42.4"},
        (1, 107), None,
    ),
    ({"eos_token_id": 7}, (7,), None),
    ({"eos_token_id": None}, None, None),
    # transformers 5.24: temperature 1 and top-k 50 unless said otherwise
    ({"do_sample": True}, None, Sampling(temperature=1.0, top_k=50)),
    ({"do_sample": False, "top_k": 9}, None, Sampling()),
    ({"temperature": 0.6}, None, Sampling(temperature=0.6, top_k=50)),
    ({"do_sample": True, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.1}, None,
     Sampling(temperature=1.0, min_p=0.1, repetition_penalty=1.1)),
    ({"num_beams": 1, "suppress_tokens": None, "guidance_scale": 1.0, "top_h": None}, None, None),
]  # fmt: skip


@pytest.mark.parametrize("said, stop_ids, sampling", SAYINGS)
def test_what_a_generation_config_says(said, stop_ids, sampling, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    found = gc.generation_defaults(tmp_path)
    assert (found.stop_ids, found.sampling) == (stop_ids, sampling)
    assert found.stop_ids_from == (stop_ids and "generation_config.json")
    assert load_sampling(str(tmp_path)) == sampling


def test_a_whole_top_k_may_be_written_as_a_float(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 64.0}')
    assert type(gc.generation_defaults(tmp_path).sampling.top_k) is int


def test_without_one_the_config_names_the_stop_ids(tmp_path):
    """transformers 5.24, `GenerationConfig.from_model_config`; there may be a text_config."""
    for config in ({"eos_token_id": [1, 9]}, {"text_config": {"eos_token_id": [1, 9]}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = gc.generation_defaults(tmp_path)
        assert (found.stop_ids, found.stop_ids_from) == ((1, 9), "config.json")


def gguf_header(path, **keys):
    """A GGUF file of keys alone."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "gemma3")
    for name, value in keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_int32
        add(f"general.sampling.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_file_says_how_to_choose_tokens(tmp_path):
    """`common_init_sampler_from_model` in llama.cpp's common/common.cpp; what is missing is as in
    its common/common.h."""
    file = gguf_header(tmp_path / "tokenizer.gguf", temp=0.7, top_k=64, mirostat=0)
    expected = Sampling(temperature=0.7, top_k=64, top_p=0.95, min_p=0.05)
    assert gc.generation_defaults(file).sampling == expected
    assert gc.generation_defaults(tmp_path).sampling == expected  # an export carries the header
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    assert gc.generation_defaults(tmp_path).sampling == Sampling()
    assert gc.generation_defaults(gguf_header(tmp_path / "silent.gguf")).sampling is None


@pytest.mark.parametrize("key, value", [("mirostat", 2), ("penalty_last_n", 64), ("foo", 1)])
def test_sampling_of_a_gguf_that_is_not_done_is_refused(tmp_path, key, value):
    file = gguf_header(tmp_path / "a.gguf", temp=1.0, **{key: value})
    with pytest.raises(gc.CheckpointError, match=rf"general\.sampling\.{key} is "):
        gc.generation_defaults(file)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"eos_token_id": "x"}, "eos_token_id must be an id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id must be an id"),
        ({"eos_token_id": True}, "eos_token_id must be an id"),
        ({"num_beams": 4}, "num_beams is 4"),
        ({"suppress_tokens": [3]}, "suppress_tokens is"),
        ({"forced_eos_token_id": 1}, "forced_eos_token_id is 1"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        ({"stop_strings": ["x"]}, "stop_strings is"),
        ({"do_sample": "yes"}, "do_sample must be"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1 must be"),
        ({"frobnicate": 1}, "'frobnicate' is not known here"),
        ([], "expected a JSON object"),
    ],
)
def test_what_is_not_done_is_refused_by_name(said, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(gc.CheckpointError, match=message) as caught:
        gc.generation_defaults(tmp_path)
    assert "generation_config.json" in str(caught.value)


# --- preprocessor_config.json and processor_config.json ------------------------------------------

# google/gemma-3-4b-it, but for the sizes.
GEMMA3 = {
    "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 4,
    "image_std": [0.5, 0.5, 0.5], "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None, "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor", "resample": 2, "rescale_factor": 0.00392156862745098,
    "size": {"height": 56, "width": 56},
}  # fmt: skip
OTHER = {
    "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3,
    "rescale_factor": 0.01, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20,
    "pan_and_scan_max_num_crops": 3, "pan_and_scan_min_ratio_to_activate": 1.5,
}  # fmt: skip
READ = ImageProcessing(
    mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), resample="bicubic", rescale=0.01,
    pan_and_scan=True, min_crop_size=20, max_num_crops=3, min_ratio=1.5,
)  # fmt: skip


def images_of(folder):
    return gc.open_source(folder).config.vision.images


def sized(tower, **changes):
    size = dict.fromkeys(("height", "width"), tower.image_size)
    return GEMMA3 | {"image_seq_length": tower.num_soft_tokens, "size": size} | changes


@pytest.fixture(scope="module")
def tower():
    return gc.open_source(SOURCE).config.vision


def test_settings_of_published_models_are_the_default(tower, tmp_path):
    assert images_of(beside(tmp_path / "a", preprocessor_config=sized(tower))) == ImageProcessing()
    nested = {"image_processor": sized(tower), "image_seq_length": tower.num_soft_tokens}
    assert images_of(beside(tmp_path / "b", processor_config=nested)) == ImageProcessing()


def test_settings_are_read_and_travel(tower, tmp_path):
    folder = beside(tmp_path / "a", preprocessor_config=sized(tower, **OTHER))
    assert images_of(folder) == READ
    model = gc.load_weights(folder)
    assert images_of(gc.save_orbax(model, tmp_path / "orbax")) == READ
    assert images_of(gc.save_hf(model, tmp_path / "hf", source=folder)) == READ
    # transformers 5.24, image_processing_base.py: what is nested in the other file comes first.
    nested = {"image_processor": sized(tower, image_mean=0.25)}
    assert images_of(beside(folder, processor_config=nested)).mean == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, lambda x: (x / 255 - 0.5) / 0.5),
        ({"do_normalize": False}, lambda x: x / 255),
        ({"do_rescale": False}, lambda x: (x - 0.5) / 0.5),
        (OTHER, lambda x: (x * 0.01 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])),
    ],
)
def test_pixels_are_those_of_the_formula(changes, expected, tower, tmp_path):
    """transformers 5.24, `rescale_and_normalize`: (level * factor - mean) / std."""
    processing = images_of(beside(tmp_path / "a", preprocessor_config=sized(tower, **changes)))
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    pixels = preprocess(Image(levels), 8, (), processing)[0].transpose(1, 2, 0)
    np.testing.assert_allclose(pixels, expected(levels.astype(np.float64)), rtol=1e-5, atol=1e-5)


def test_the_filter_that_resizes():
    """Numbered as in transformers, which takes Pillow's numbers."""
    picture = Image(np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8))
    for number, name in enumerate(RESAMPLING):
        pixels = preprocess(picture, 8, (), ImageProcessing(resample=name))[0]
        levels = np.rint(pixels.transpose(1, 2, 0) * 127.5 + 127.5)
        np.testing.assert_array_equal(levels, picture.to_pil().resize((8, 8), number))


@pytest.mark.parametrize("asked, crops", [(None, 3), (True, 3), (False, 0), (PanAndScan(), 0)])
def test_whoever_calls_has_the_last_word_on_crops(asked, crops):
    cfg = vision(images=READ)
    picture = np.zeros((60, 190, 3), np.uint8)  # PanAndScan() asks for crops of 256 pixels
    item = image_modality(cfg, pan_and_scan=asked).prepare(picture)
    assert len(item.inputs) == 1 + crops


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": {"height": 224, "width": 224}}, "size .*224.* is not that of the tower"),
        ({"size": {"shortest_edge": 56}}, "size"),
        ({"image_seq_length": 3}, "image_seq_length 3 is not"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_center_crop": True}, "do_center_crop is True"),
        ({"resample": 9}, "resample must be"),
        ({"image_mean": [1, 2]}, "image_mean must be three"),
        ({"image_std": [0, 1, 1]}, "std="),
        ({"rescale_factor": -1}, "rescale_factor must be"),
        ({"do_pan_and_scan": "on"}, "do_pan_and_scan must be"),
        ({"pan_and_scan_max_num_crops": 0}, "pan_and_scan_max_num_crops must be"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"sharpen": 2}, "'sharpen' is not known here"),
    ],
)
def test_what_pictures_cannot_have_done_is_refused(changes, message, tower, tmp_path):
    folder = beside(tmp_path / "a", preprocessor_config=sized(tower, **changes))
    with pytest.raises(gc.CheckpointError, match=message) as caught:
        gc.describe(folder)
    assert "preprocessor_config.json" in str(caught.value)


def test_such_a_gguf_is_refused_when_its_model_is_loaded(gguf_file, monkeypatch):
    from gemma_checkpoints.gguf import source

    def with_mirostat(path):
        headers = read_parts(path)
        headers[path].metadata["general.sampling.mirostat"] = 2
        return headers

    read_parts = source.read_parts
    gc.open_source(gguf_file)
    monkeypatch.setattr(source, "read_parts", with_mirostat)
    with pytest.raises(gc.CheckpointError, match=r"general\.sampling\.mirostat is 2"):
        gc.open_source(gguf_file)
