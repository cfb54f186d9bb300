"""Folders of ours."""

import json
import shutil

import numpy as np
import pytest
from tiny_checkpoints import DATA, by_name

import gemma_checkpoints as gc

# After a first error Orbax closes its event loop, and threads of TensorStore that still read find
# it closed: at any time later, so often in the next test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def saved(hf_folder, tmp_path):
    (hf_folder / "tokenizer.json").write_text("{}")
    model = gc.load_weights(hf_folder, layout="scan")
    return gc.save_orbax(model, tmp_path / "ours", source=hf_folder)


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_there_and_back_in_either_layout(layout, saved, tmp_path):
    model = gc.load_weights(saved, layout=layout)
    assert {a.dtype.name for a in by_name(model).values()} == {"bfloat16"}
    out = gc.save_hf(model, tmp_path / "hf_again")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (DATA / "g3_text" / name).read_bytes()


def test_other_dtype(saved):
    arrays = by_name(gc.load_weights(saved, dtype="float32"))
    assert {a.dtype for a in arrays.values()} == {np.dtype("float32")}


def test_the_tokenizer_is_in_it(saved):
    assert gc.describe(saved).tokenizer == saved / "tokenizer.json"


def test_foreign_versions_and_configs(saved):
    manifest = saved / "gemma_jax.json"
    good = json.loads(manifest.read_text())
    for bad, message in (
        (good | {"version": 3}, "version 3; expected 1"),
        ({"version": 1}, "broken config: 'config'"),
        (good | {"config": good["config"] | {"wings": 2}}, "broken config: .*wings"),
        (good | {"config": good["config"] | {"d_model": -1}}, "d_model=-1 must be positive"),
        (good | {"config": good["config"] | {"vision": {"wings": 2}}}, "broken config: .*wings"),
        (good | {"config": good["config"] | {"d_model": 71}}, "has shape"),
    ):
        manifest.write_text(json.dumps(bad))
        with pytest.raises(gc.CheckpointError, match=message):
            gc.load_weights(saved)


def test_folders_older_than_vision(saved):
    manifest = saved / "gemma_jax.json"
    old = json.loads(manifest.read_text())
    del old["config"]["vision"]
    manifest.write_text(json.dumps(old))
    assert gc.load_weights(saved).vision is None


def test_damaged_arrays(saved):
    for file in (saved / "arrays").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(gc.CheckpointError, match="cannot be read as an Orbax folder") as caught:
        gc.load_weights(saved)
    assert "\n" not in str(caught.value)


def test_missing_arrays(saved):
    shutil.rmtree(saved / "arrays")
    with pytest.raises(gc.CheckpointError, match="the arrays are missing"):
        gc.load_weights(saved)
