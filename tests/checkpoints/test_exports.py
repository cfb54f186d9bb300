"""An export is there whole, or not at all."""

import errno
import os
import shutil

import jax.numpy as jnp
import pytest
from tiny_checkpoints import DATA

import gemma_checkpoints as gc
from gemma_checkpoints import folders, safetensors_file

SAVERS = (gc.save_hf, gc.save_orbax)


@pytest.fixture(scope="module")
def model():
    return gc.load_weights(DATA / "g3_text")


def no(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_disk_full_while_writing(model, tmp_path, monkeypatch):
    real, written = safetensors_file.np.ascontiguousarray, []

    def fail_late(array):
        written.append(array)
        return real(array) if len(written) < 9 else no(errno.ENOSPC)()

    monkeypatch.setattr(safetensors_file.np, "ascontiguousarray", fail_late)
    with pytest.raises(gc.CheckpointError, match="no space left"):
        gc.save_hf(model, tmp_path / "out")
    assert len(written) == 9 and not list(tmp_path.iterdir())


def test_disk_full_in_orbax(model, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", no(errno.ENOSPC))
    with pytest.raises(gc.CheckpointError, match="no space left"):
        gc.save_orbax(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", SAVERS)
def test_disk_known_to_be_too_small(save, model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(gc.CheckpointError, match="the disk has 1,000 left"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize(
    ("code", "message"), [(errno.EACCES, "no permission"), (errno.EROFS, "read-only")]
)
def test_no_permission(save, code, message, model, tmp_path, monkeypatch):
    monkeypatch.setattr(folders.Path, "mkdir", no(code))
    with pytest.raises(gc.CheckpointError, match=message):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", SAVERS)
def test_interrupted(save, model, tmp_path, monkeypatch):
    def stop(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", SAVERS)
def test_taken_targets(save, model, tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("data")
    file.write_text("data")
    with pytest.raises(gc.CheckpointError, match="not empty"):
        save(model, full)
    with pytest.raises(gc.CheckpointError, match="a file is in the way"):
        save(model, file)
    with pytest.raises(gc.CheckpointError, match="parent folder does not exist"):
        save(model, tmp_path / "no" / "where")
    assert [p.name for p in full.iterdir()] == ["precious"] and file.read_text() == "data"


@pytest.mark.parametrize("save", SAVERS)
def test_a_source_that_is_not_there(save, model, tmp_path):
    with pytest.raises(gc.CheckpointError, match="no such file or folder"):
        save(model, tmp_path / "out", source=tmp_path / "source")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", SAVERS)
def test_an_empty_folder_is_filled(save, model, tmp_path):
    (tmp_path / "out").mkdir()
    assert gc.open_source(save(model, tmp_path / "out")).config == model.cfg
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("save", SAVERS)
def test_quantised_parameters_are_refused(save, tmp_path):
    as_int8 = lambda path, a: a.astype(jnp.int8)  # noqa: E731
    model = gc.load_weights(DATA / "g3_text", transform=lambda _: as_int8)
    with pytest.raises(gc.CheckpointError, match="is int8: only plain floats"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
