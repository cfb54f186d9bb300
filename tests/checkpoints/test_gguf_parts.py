"""GGUF files in parts, as gguf-py and llama.cpp's `gguf-split` write them."""

import shutil

import numpy as np
import pytest
from tiny_checkpoints import by_name, plain, random_model, tiny, write_gguf

import gemma_checkpoints as gc

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
MODEL = tiny("gemma3-1b", tied_head=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_gguf(folder / "model.gguf", random_model(MODEL), "gemma3", plain, split=20)
    return folder


@pytest.fixture
def parts(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return sorted(tmp_path.glob("*.gguf"))


def name(i, count=5):
    return f"model-{i:05}-of-{count:05}.gguf"


@pytest.mark.parametrize("given", range(5))
def test_any_part_is_the_model(given, parts):
    assert [part.name for part in parts] == [name(i) for i in range(1, 6)]
    loaded, reference = gc.load_weights(parts[given]), by_name(random_model(MODEL))
    assert loaded.cfg == MODEL
    for key, value in by_name(loaded).items():  # norms went through 1 + x and back
        np.testing.assert_allclose(value, reference[key], atol=1e-7, err_msg=key)
    assert gc.tokenizer_path(parts[given]) == parts[0], "the first one has the metadata"
    described = gc.describe(parts[given])
    assert described.num_params == sum(a.size for a in reference.values())


def test_an_export_of_a_later_part_carries_the_vocabulary(parts, tmp_path):
    model = gc.load_weights(parts[2])
    out = gc.save_hf(model, tmp_path / "out", source=parts[2])
    assert gc.tokenizer_path(out).name == "tokenizer.gguf"
    assert gguf.GGUFReader(out / "tokenizer.gguf").fields["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("given", [0, 3])
def test_missing_parts_are_named(given, parts):
    parts[1].unlink()
    parts[4].unlink()
    with pytest.raises(gc.CheckpointError) as caught:
        gc.load_weights(parts[given])
    assert caught.value.problems == tuple(
        f"{name(i)} is missing: all 5 parts must lie in one folder" for i in (2, 5)
    )


def test_a_missing_first_part_is_named(parts):
    parts[0].unlink()
    with pytest.raises(gc.CheckpointError, match=f"{name(1)} is missing"):
        gc.load_weights(parts[1])


def test_a_part_by_another_name_says_that_it_is_one(parts):
    other = parts[1].rename(parts[1].with_name("weights.gguf"))
    with pytest.raises(gc.CheckpointError, match="a part of a model in 5 parts.*NAME-00002-of-0"):
        gc.load_weights(other)


def test_parts_of_another_model_are_refused(parts, tmp_path):
    shutil.copy(parts[1], parts[2])
    with pytest.raises(gc.CheckpointError) as caught:
        gc.load_weights(parts[0])
    assert f"{name(3)}: split.no is 1; its name says 2" in str(caught.value)
    assert f"occurs in {name(2)} and in {name(3)}" in str(caught.value)


def test_a_part_that_lost_tensors_is_refused(parts):
    reader = gguf.GGUFReader(parts[4])
    writer = gguf.GGUFWriter(parts[4].with_suffix(".new"), "gemma3")
    writer.kv_data = [{}]
    for key, value in (("split.no", 4), ("split.count", 5)):
        writer.add_uint16(key, value)
    for tensor in reader.tensors[:-1]:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts[4].with_suffix(".new").rename(parts[4])
    with pytest.raises(gc.CheckpointError, match="the parts hold .* tensors; the first one decl"):
        gc.load_weights(parts[0])


def test_a_cut_off_part_is_named(parts):
    parts[3].write_bytes(parts[3].read_bytes()[:-100])
    with pytest.raises(gc.CheckpointError, match="cut off"):
        gc.load_weights(parts[0])
