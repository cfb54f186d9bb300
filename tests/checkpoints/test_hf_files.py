"""Which files of a folder are read, and what may be absent from it.

The order is that of transformers 5.24, `modeling_utils._get_resolved_checkpoint_files`.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import DATA, by_name

import gemma_checkpoints as gc
from gemma_jax.loading import load_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def shards(hf_folder, tmp_path):
    return gc.save_hf(gc.load_weights(hf_folder), tmp_path / "shards", max_shard_bytes=150_000)


def edit_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def assert_same(folder, reference):
    ours, theirs = by_name(gc.load_weights(folder)), by_name(gc.load_weights(reference))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_single_file_goes_before_an_index(shards, hf_folder):
    """Even one that names other files, or none that is there."""
    (shards / INDEX).write_text('{"weight_map": {"a": "nowhere.safetensors"}}')
    shutil.copy(hf_folder / SINGLE, shards)
    for shard in shards.glob("model-*"):
        shard.write_bytes(b"broken")
    assert_same(shards, hf_folder)


def test_only_files_that_the_index_names_are_read(shards, hf_folder):
    (shards / "model-00001-of-00099.safetensors").write_bytes(b"left from another export")
    assert_same(shards, hf_folder)


def test_an_index_may_list_a_tied_head_that_no_file_has(shards, hf_folder):
    edit_index(shards, lambda where: where.update({"lm_head.weight": min(where.values())}))
    assert_same(shards, hf_folder)


def test_tensors_are_found_in_any_file_that_is_read(shards, hf_folder):
    """The index says which files there are; what is in them they say themselves."""
    first, last = (json.loads((shards / INDEX).read_text())["weight_map"][name] for name in (
        "model.embed_tokens.weight", "model.norm.weight"))  # fmt: skip

    def swap(where):
        where |= {"model.embed_tokens.weight": last, "model.norm.weight": first}

    edit_index(shards, swap)
    assert_same(shards, hf_folder)


def test_a_tensor_that_only_the_index_has_is_missed(shards):
    file = next(f for f in shards.glob("model-*") if "model.norm.weight" in load_file(f))
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file)
    with pytest.raises(gc.CheckpointError, match="norm.weight is missing"):
        gc.load_weights(shards)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is not read without an index"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors is not read"),
        ("notes.txt", f"model.safetensors is missing; expected it or {INDEX} beside config.json$"),
    ],
)
def test_a_folder_without_weights_says_what_it_has_instead(name, message, hf_folder):
    (hf_folder / SINGLE).rename(hf_folder / name)
    with pytest.raises(gc.CheckpointError, match=message):
        gc.load_weights(hf_folder)


@pytest.fixture
def seeing(tmp_path):
    folder = tmp_path / "mm"
    shutil.copytree(DATA / "g3_mm", folder, ignore=lambda _, names: {
        name for name in names if name not in ("config.json", SINGLE)})  # fmt: skip
    return folder


@pytest.mark.parametrize("tower", ["absent", None, {}, {"model_type": "clip_vision_model"}])
@pytest.mark.parametrize("weights", ["with its tower", "without"])
def test_a_decoder_does_without_what_is_said_of_images(tower, weights, seeing):
    config = json.loads((seeing / "config.json").read_text()) | {"vision_config": tower}
    config = {key: value for key, value in config.items() if value != "absent"}
    (seeing / "config.json").write_text(json.dumps(config))
    if weights == "without":
        tensors = load_file(seeing / SINGLE)
        save_file({k: v for k, v in tensors.items() if "language_model" in k}, seeing / SINGLE)
    reference = by_name(gc.load_weights(DATA / "g3_mm", modalities=("text",)))
    loaded = by_name(load_model(str(seeing), modalities=("text",), dtype="bfloat16"))
    assert all(np.array_equal(loaded[name], reference[name]) for name in reference)
    assert gc.describe(seeing, modalities=("text",)).config.vision is None
    for modalities in (None, ("text", "image")):
        with pytest.raises(gc.CheckpointError, match=r'vision_config.*modalities=\("text",\)'):
            gc.load_weights(seeing, modalities=modalities)


def test_gemma_3n_does_without_the_configs_of_its_towers(tmp_path):
    config = json.loads((DATA / "g3n_mm" / "config.json").read_text())
    for key in ("vision_config", "audio_config"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(DATA / "g3n_mm" / SINGLE, tmp_path)
    reference = by_name(gc.load_weights(DATA / "g3n_mm", modalities=("text",)))
    loaded = by_name(gc.load_weights(tmp_path, modalities=("text",)))
    assert all(np.array_equal(loaded[name], reference[name]) for name in reference)
