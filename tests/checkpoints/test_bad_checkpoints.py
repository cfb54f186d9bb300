"""Whatever is wrong with a checkpoint is said in one error, with names."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import DATA, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc


@pytest.fixture
def edit_tensors(hf_folder):
    """`edit_tensors(change)` lets `change(tensors)` work on `model.safetensors`."""

    def edit(change):
        file = hf_folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return hf_folder

    return edit


def assert_refused(path, *messages):
    with pytest.raises(gc.CheckpointError) as caught:
        gc.load_weights(path)
    for message in messages:
        assert message in str(caught.value)
    return caught.value


def test_everything_wrong_at_once(edit_tensors):
    """Missing, surplus, misshapen and of a wrong type: one error names all four."""

    def change(tensors):
        del tensors["model.layers.3.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(71, np.float32)
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(24, np.int32)

    error = assert_refused(
        edit_tensors(change),
        "4 problems",
        "layers.3.mlp.up_proj.weight is missing: expected [96, 72]",
        "layers.9.mlp.up_proj.weight is surplus: the config (7 layers) has no place for it",
        "norm.weight has shape [71], but the config makes it [72]",
        "layers.0.self_attn.q_norm.weight is stored as I32; expected F32, F16, BF16",
    )
    assert len(error.problems) == 4


def test_a_long_list_is_cut(edit_config):
    error = assert_refused(edit_config(hidden_size=80), "and ", " more")
    assert len(error.problems) > 50 and len(str(error).splitlines()) < 12


def test_transposed_weights(edit_tensors):
    name = "model.layers.2.mlp.down_proj.weight"

    def change(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    assert_refused(edit_tensors(change), "has shape [96, 72], but the config makes it [72, 96]")


def test_vision_tensors_in_a_text_only_folder(edit_tensors):
    def change(tensors):
        tensors["vision_tower.x"] = np.zeros(1, np.float32)

    assert_refused(edit_tensors(change), "vision_tower.x is surplus")


@pytest.fixture
def seeing_folder(tmp_path):
    """A writable copy of a tiny Gemma 3 with a tower."""
    folder = tmp_path / "mm"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DATA / "g3_mm" / name, folder)
    return folder


def test_everything_wrong_with_a_tower_at_once(seeing_folder):
    file = seeing_folder / "model.safetensors"
    tensors, tower = load_file(file), "vision_tower.vision_model."
    del tensors[tower + "encoder.layers.1.mlp.fc1.bias"]
    del tensors["multi_modal_projector.mm_soft_emb_norm.weight"]
    tensors[tower + "encoder.layers.3.mlp.fc1.bias"] = np.zeros(48, np.float32)
    tensors[tower + "head.probe"] = np.zeros((1, 1, 32), np.float32)
    tensors[tower + "embeddings.patch_embedding.weight"] = np.zeros((32, 14, 14, 3), np.float32)
    projection = "multi_modal_projector.mm_input_projection_weight"
    tensors[projection] = np.ascontiguousarray(tensors[projection].T)
    save_file(tensors, file)
    error = assert_refused(
        seeing_folder,
        "6 problems",
        "vision_tower.encoder.layers.1.mlp.fc1.bias is missing: expected [48]",
        "multi_modal_projector.mm_soft_emb_norm.weight is missing: expected [32]",
        "vision_tower.encoder.layers.3.mlp.fc1.bias is surplus: the config (7 and 3 layers)",
        "vision_tower.head.probe is surplus",
        "patch_embedding.weight has shape [32, 14, 14, 3], but the config makes it [32, 3, 14, 14]",
        "mm_input_projection_weight has shape [48, 32], but the config makes it [32, 48]",
    )
    assert len(error.problems) == 6


def test_a_tower_that_is_not_there(seeing_folder):
    """All of it is missed, unless only the decoder is wanted."""
    file = seeing_folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k.startswith("language_model.")}, file)
    error = assert_refused(
        seeing_folder, "multi_modal_projector.mm_soft_emb_norm.weight is missing"
    )
    assert len(error.problems) == 3 * 16 + 5 + 2
    assert gc.load_weights(seeing_folder, modalities=("text",)).vision is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "config.json: vision_config is missing"),
        ({"vision_config": {"vision_use_head": True}}, "vision_use_head is True"),
        ({"mm_tokens_per_image": 5}, "config.json: num_soft_tokens=5 must be a square"),
    ],
)
def test_wrong_vision_configs(changes, message, seeing_folder):
    path = seeing_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert len(assert_refused(seeing_folder, message).problems) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(dtype, value, edit_tensors):
    def change(tensors):
        for i, name in ((1, "model.layers.1.mlp.up_proj.weight"), (2, "model.norm.weight")):
            array = tensors[name].astype(dtype)
            array.reshape(-1)[:i] = value
            tensors[name] = array

    assert_refused(
        edit_tensors(change),
        "layers.1.mlp.up_proj.weight: 1 values are NaN or infinite",
        "norm.weight: 2 values are NaN or infinite",
    )


def test_a_scale_that_is_no_number_in_a_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")

    def encode(name, array):
        blocks = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        if name == "blk.2.ffn_up.weight":
            blocks[3, :2] = 0xFF  # NaN as float16
        return blocks, gguf.GGMLQuantizationType.Q8_0

    path = write_gguf(tmp_path / "m.gguf", random_model(tiny("gemma3-1b")), "gemma3", encode)
    assert_refused(path, "blk.2.ffn_up.weight: 32 values are NaN or infinite")


@pytest.mark.parametrize("part", [0, 4, 8, 2_000, 20_000, 641_263])
def test_cut_off_safetensors(part, hf_folder):
    file = hf_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:part])
    assert_refused(hf_folder, "model.safetensors", "cut off")


def test_safetensors_with_a_tail(hf_folder):
    with open(hf_folder / "model.safetensors", "ab") as file:
        file.write(b"tail")
    assert_refused(hf_folder, "too long")


def rewrite_header(hf_folder, change):
    file = hf_folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return hf_folder


def edited(name="model.norm.weight", **entry):
    def change(text):
        header = json.loads(text)
        header[name] |= entry
        return json.dumps(header).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20] + b"x" * 20, "not valid JSON"),
        (lambda text: b"[" * 100_000, "not valid JSON"),
        (lambda text: b"[]", "not a JSON object"),
        (lambda text: b'{"a":1,"a":2}', "a name occurs twice"),
        (edited(shape=[73]), "takes 146 bytes, not 144"),
        (edited(shape=[-72]), "must be sizes"),
        (edited(shape=[1] * 72), "must be sizes"),
        (edited(shape=[1 << 60]), "must be sizes"),
        (edited(data_offsets=[0, 144]), "overlap or leave a gap"),
        (edited(data_offsets=[0]), "broken header entry"),
        (edited(dtype="F32"), "F32 of shape [72] takes 288 bytes, not 144"),
        (edited(dtype="U8"), "U8 of shape [72] takes 72 bytes, not 144"),
        (edited(dtype="F8_E4M3"), "norm.weight is stored as F8_E4M3"),
    ],
)
def test_broken_safetensors_headers(change, message, hf_folder):
    assert_refused(rewrite_header(hf_folder, change), message)


@pytest.mark.parametrize("length", [0, 1 << 40, (1 << 64) - 1])
def test_forged_header_lengths(length, hf_folder):
    file = hf_folder / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert_refused(hf_folder, f"a header of {length}")


def sharded(hf_folder, tmp_path):
    return gc.save_hf(gc.load_weights(hf_folder), tmp_path / "shards", max_shard_bytes=150_000)


def test_missing_shard(hf_folder, tmp_path):
    out = sharded(hf_folder, tmp_path)
    next(out.glob("model-00002*")).unlink()
    assert_refused(out, "model-00002-of-", "is missing")


def test_broken_index(hf_folder, tmp_path):
    out = sharded(hf_folder, tmp_path)
    index = out / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    where = good["weight_map"]
    for bad, message in (
        (index.read_text()[:100], "not valid JSON"),
        ("{}", "expected a weight_map"),
        (json.dumps({"weight_map": where | {"a": "../secret"}}), "'../secret' is not a file name"),
        (json.dumps({"weight_map": where | {"a": "b"}}), "b is missing: model.safetensors.index"),
    ):
        index.write_text(bad)
        assert_refused(out, message)


def test_a_name_in_two_shards(hf_folder, tmp_path):
    out = sharded(hf_folder, tmp_path)
    files = sorted(out.glob("*.safetensors"))
    tensors = load_file(files[1]) | {"model.norm.weight": np.zeros(72, ml_dtypes.bfloat16)}
    save_file(tensors, files[1])
    assert_refused(out, "model.norm.weight: occurs twice")


def test_wrong_configs(hf_folder, edit_config):
    assert_refused(edit_config(num_hidden_layers=6, layer_types=None), "layers.6.", "surplus")
    assert_refused(edit_config(model_type="mistral"), "model_type 'mistral' is not supported")
    (hf_folder / "config.json").write_text("{")
    assert_refused(hf_folder, "config.json: not valid JSON")
    (hf_folder / "config.json").write_text("[1]")
    assert_refused(hf_folder, "expected a JSON object, got list")


def test_no_checkpoint_at_all(tmp_path):
    assert_refused(tmp_path, "not a checkpoint: expected a .gguf file")
    with pytest.raises(gc.CheckpointError, match="not a checkpoint: expected a .gguf file"):
        gc.tokenizer_path(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"PK\x03\x04")
    assert_refused(tmp_path / "weights.gguf", "not a checkpoint")
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    assert_refused(tmp_path, "model.safetensors is missing")
    with pytest.raises(gc.CheckpointError, match="no tokenizer found"):
        gc.tokenizer_path(tmp_path)


@pytest.mark.parametrize("part", [4, 5, 24, 100, 700, 3_000, 100_000, -1])
def test_cut_off_gguf(part, gguf_file):
    gguf_file.write_bytes(gguf_file.read_bytes()[:part])
    assert_refused(gguf_file, "cut off" if part == 100_000 or part == -1 else "cut-off")


def patched(gguf_file, offset, value, size=8):
    data = bytearray(gguf_file.read_bytes())
    data[offset : offset + size] = value.to_bytes(size, "little")
    gguf_file.write_bytes(data)
    return gguf_file


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, (1 << 32) | 99, "version 2 or 3"),
        (8, 1 << 62, "tensors declared"),
        (16, 1 << 62, "GGUF header"),
        (24, (1 << 64) - 1, "bytes expected at byte"),
    ],
)
def test_forged_gguf_counts(offset, value, message, gguf_file):
    assert_refused(patched(gguf_file, offset, value), message)


def test_forged_gguf_tensors(gguf_file):
    """After a tensor's name come its rank, shape, type and offset."""
    at = gguf_file.read_bytes().index(b"output_norm.weight") + len(b"output_norm.weight")
    assert_refused(patched(gguf_file, at + 12, 999, 4), "unknown tensor type 999")
    assert_refused(patched(gguf_file, at + 12, 26, 4), "output_norm.weight is stored as I32")
    patched(gguf_file, at + 12, 0, 4)  # F32 again
    assert_refused(patched(gguf_file, at + 16, 1 << 60), "output_norm.weight ends at byte")
    patched(gguf_file, at + 16, 0)
    assert_refused(
        patched(gguf_file, at + 4, 1 << 60), "broken or cut-off GGUF header: a tensor of shape"
    )


def test_other_architectures(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_model(tiny("gemma3-1b")), "llama", plain)
    assert_refused(path, "general.architecture 'llama' is not supported")


def test_surplus_tensors_in_a_gguf(tmp_path):
    extra = {"v.patch_embd.weight": np.zeros((2, 2), np.float32)}
    model = random_model(tiny("gemma3-1b"))
    path = write_gguf(tmp_path / "m.gguf", model, "gemma3", plain, **extra)
    assert_refused(path, "v.patch_embd.weight is surplus")
