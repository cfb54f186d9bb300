"""The tower of a Gemma 3 in a file of its own, `mmproj`, as llama.cpp keeps it.

The file is written here with the names of the `gguf` package's own map, from the tiny model of
`parity/data`, by the rules of `Gemma3VisionModel` in llama.cpp's `conversion/gemma.py`.
"""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from parity.goldens import assert_close, case
from safetensors.numpy import load_file
from tiny_checkpoints import DATA, by_name, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc
import gemma_jax as gj
from gemma_checkpoints.gguf import mmproj
from gemma_jax.multimodal.encode import encode_images

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

SOURCE = DATA / "g3_mm"
CONFIG = json.loads((SOURCE / "config.json").read_text())
TOWER = CONFIG["vision_config"]
SIZES = {
    "clip.vision.image_size": TOWER["image_size"],
    "clip.vision.patch_size": TOWER["patch_size"],
    "clip.vision.embedding_length": TOWER["hidden_size"],
    "clip.vision.feed_forward_length": TOWER["intermediate_size"],
    "clip.vision.block_count": TOWER["num_hidden_layers"],
    "clip.vision.attention.head_count": TOWER["num_attention_heads"],
    "clip.vision.projection_dim": CONFIG["text_config"]["hidden_size"],
    "clip.vision.projector.scale_factor": 2,
}
OTHERS = {
    "general.type": "mmproj",
    "general.file_type": 0,
    "clip.has_vision_encoder": True,
    "clip.projector_type": "gemma3",
    "clip.use_gelu": True,
    "clip.vision.attention.layer_norm_epsilon": TOWER["layer_norm_eps"],
    "clip.vision.image_mean": [0.5, 0.5, 0.5],
    "clip.vision.image_std": [0.5, 0.5, 0.5],
}
HEADER = SIZES | OTHERS | {"general.architecture": "clip"}


def tower_tensors() -> dict[str, np.ndarray]:
    """Their names -> values, in float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, TOWER["num_hidden_layers"])
    found = {}
    for name, array in load_file(SOURCE / "model.safetensors").items():
        name = name.removeprefix("model.").replace("_weight", ".weight")
        if not name.startswith(("vision_tower.", "multi_modal_projector.")):
            continue
        if "vision_model." not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = array.astype(np.float32)
        found[theirs] = array + 1 if "soft_emb_norm" in name else array
    return found


def write_mmproj(path, tensors, header=HEADER):
    writer = gguf.GGUFWriter(path, header["general.architecture"])
    for key, value in header.items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32,
               float: writer.add_float32, list: writer.add_array}  # fmt: skip
        add[type(value)](key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(**named: int) -> list[bytes]:
    """A vocabulary of the tiny model, with some pieces at their ids."""
    found = [f"[PAD{i}]".encode() for i in range(CONFIG["text_config"]["vocab_size"])]
    for name, index in named.items():
        found[index] = f"<{name}>".encode()
    return found


VOCABULARY = pieces(start_of_image=288, end_of_image=289, image_soft_token=290)


@pytest.fixture(scope="module")
def whole():
    return gc.load_weights(SOURCE, dtype="float32")


@pytest.fixture(scope="module")
def decoder_file(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "model.gguf"
    text = gc.load_weights(SOURCE, dtype="float32", modalities=("text",))
    return write_gguf(path, text, "gemma3", plain, pieces=VOCABULARY)


@pytest.fixture(scope="module")
def tower_file(tmp_path_factory):
    return write_mmproj(tmp_path_factory.mktemp("tower") / "mmproj.gguf", tower_tensors())


def test_both_files_together_are_the_model(whole, decoder_file, tower_file):
    model = gc.load_weights(decoder_file, mmproj=tower_file)
    assert model.cfg == whole.cfg
    expected = by_name(whole)
    for name, array in by_name(model).items():  # Gemma's norms went through 1 + x and back
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)


def test_soft_tokens_are_those_of_transformers(decoder_file, tower_file):
    given, expected, tolerance = case("g3_mm", "forward")
    model = gj.load_model(str(decoder_file), mmproj=str(tower_file), dtype="float32")
    soft, _ = encode_images(model, jnp.asarray(given["pixel_values"]))
    assert_close(soft, expected["projector_output"], tolerance["projector_output"])


@pytest.mark.parametrize("modalities", [("text",), ("text", "image"), None])
def test_parts_by_what_is_wanted(decoder_file, tower_file, modalities):
    seen = gc.describe(decoder_file, mmproj=tower_file, modalities=modalities)
    alone = gc.describe(decoder_file)
    assert alone.config.vision is None, "a file beside it is not looked for"
    sees = modalities != ("text",)
    assert (seen.config.vision is not None) == sees
    assert (seen.num_params > alone.num_params) == sees


def test_the_first_files_called_two_matrices_by_each_others_name(whole, decoder_file, tmp_path):
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    tensors = {}
    for name, array in tower_tensors().items():
        part = name.split(".")[3] if name.startswith("v.blk.") else ""
        tensors[name.replace(part, swap[part]) if part in swap else name] = array
    old = {k: v for k, v in HEADER.items() if k != "general.type"} | {
        "clip.has_text_encoder": False,
        "clip.has_llava_projector": False,
    }
    model = gc.load_weights(decoder_file, mmproj=write_mmproj(tmp_path / "old", tensors, old))
    expected, found = by_name(whole), by_name(model)
    name = "vision.tower.blocks.1.ffn.up.w"
    np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip.projector_type": "gemma3nv"}, r"projector_type is \['gemma3nv'\]; expected 'gemm"),
        ({"clip.projector_type": None}, "projector_type is None; expected 'gemma3'"),
        ({"clip.has_audio_encoder": True}, "has_audio_encoder is True; only False is supported"),
        ({"clip.use_gelu": None}, "use_gelu is None; expected True"),
        ({"clip.use_silu": True}, "use_silu is True; only False"),
        ({"clip.vision.feature_layer": [3]}, "clip.vision.feature_layer: unknown here"),
        ({"clip.vision.projection_dim": 64}, "projection_dim is 64, but .* d_model=48: .* another"),
        ({"clip.vision.projector.scale_factor": 3}, "scale_factor 3 does not divide the 4 patches"),
        ({"clip.vision.block_count": 10**9}, "block_count 1000000000 is beyond"),
        ({"clip.vision.block_count": 2}, "v.blk.2.attn_k.bias is surplus"),
        ({"clip.vision.block_count": 4}, "v.blk.3.attn_k.bias is missing"),
        ({"clip.vision.image_mean": None}, "image_mean must be three numbers, got None"),
        ({"clip.vision.embedding_length": 64}, "v.blk.0.attn_k.weight has shape"),
        ({"general.architecture": "gemma3"}, "general.architecture is 'gemma3'; expected 'clip'"),
    ],
)  # fmt: skip
def test_other_towers_are_refused(decoder_file, tmp_path, changes, message):
    header = {key: value for key, value in (HEADER | changes).items() if value is not None}
    path = write_mmproj(tmp_path / "mmproj.gguf", tower_tensors(), header)
    with pytest.raises(gc.CheckpointError, match=message) as caught:
        gc.describe(decoder_file, mmproj=path)
    assert len(caught.value.problems[0].splitlines()) == 1


def test_files_that_do_not_go_together_are_refused(decoder_file, tower_file, tmp_path):
    for wrong, tower, message in (
        (SOURCE, tower_file, "mmproj goes with a GGUF file, and .*g3_mm is none"),
        (decoder_file, tmp_path / "none", "none: no such file"),
        (decoder_file, decoder_file, "general.architecture is 'gemma3'; expected 'clip'"),
        (tower_file, None, "not a language model; it is the tower of one, give that and this as"),
        (DATA / "quant" / "g3n_q4_0.gguf", tower_file, "goes with a 'gemma3', not with a 'gemma3n"),
    ):
        with pytest.raises(gc.CheckpointError, match=message):
            gc.open_source(wrong, mmproj=tower)


def test_a_decoder_that_never_sees_has_no_marks_of_images(whole, tower_file, tmp_path):
    text = gc.load_weights(SOURCE, dtype="float32", modalities=("text",))
    for vocabulary, message in (
        (pieces(), "has no <start_of_image> and no <end_of_image>: its model reads text alone"),
        (pieces(start_of_image=3), "has no <end_of_image>"),
    ):
        path = write_gguf(tmp_path / "m.gguf", text, "gemma3", plain, pieces=vocabulary)
        with pytest.raises(gc.CheckpointError, match=message):
            gc.open_source(path, mmproj=tower_file)
    cut = pieces(start_of_image=288, end_of_image=289)
    path = write_gguf(tmp_path / "m.gguf", text, "gemma3", plain, pieces=cut)
    vision = gc.open_source(path, mmproj=tower_file).config.vision
    assert vision == replace(whole.cfg.vision, image_token=mmproj.IMAGE_TOKEN)


def test_a_folder_is_made_of_both(decoder_file, tower_file, whole, tmp_path):
    model = gc.load_weights(decoder_file, mmproj=tower_file)
    out = gc.save_hf(model, tmp_path / "out", source=decoder_file)
    assert gc.describe(out).config == whole.cfg


def test_every_key_has_one_fate():
    assert all(map(mmproj.has_fate, HEADER))
    kinds = [set(mmproj.FIXED), set(mmproj.UNSET), {f"clip.vision.{key}" for key in mmproj.READ}]
    assert len(set.union(*kinds)) == sum(map(len, kinds))


def test_a_text_model_wants_the_file_for_images(gguf_file):
    with pytest.raises(gc.CheckpointError, match="images need its tower, mmproj=FILE, or the Hug"):
        gc.load_weights(gguf_file, modalities=("text", "image"))
    assert random_model(tiny("gemma3-4b")).vision is None
