"""The folder of compiled programs, where it can be used and where not."""

import math
import os

import jax
import pytest

from gemma_jax.cli import common
from gemma_jax.inference import stored_programs

NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def restored():
    before = {name: getattr(jax.config, name) for name in NAMES}
    kept = stored_programs._folder
    common._use_of_cache.cache_clear()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    stored_programs.keep_programs(kept)


@pytest.fixture
def set_up(monkeypatch, capsys):
    """`set_up(folder)` sets JAX up twice with that folder, and returns what stderr says."""

    def call(folder) -> str:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        common.set_up_jax()
        common.set_up_jax()
        return capsys.readouterr().err

    return call


def test_a_folder_is_made_and_used(set_up, tmp_path):
    assert set_up(tmp_path / "new") == ""
    assert (tmp_path / "new").is_dir()
    assert jax.config.jax_enable_compilation_cache
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_what_cannot_be_a_folder_is_said_once(set_up, tmp_path):
    (tmp_path / "file").write_text("")
    said = set_up(tmp_path / "file" / "xla")
    assert said == f"no cache at {tmp_path}/file/xla (Not a directory): every start compiles\n"
    assert not jax.config.jax_enable_compilation_cache


def test_a_folder_that_is_read_only_is_read(set_up, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    said = set_up(tmp_path)
    assert said.startswith(f"the cache at {tmp_path} cannot be written: ")
    assert said.count("\n") == 1
    assert jax.config.jax_enable_compilation_cache
    assert jax.config.jax_persistent_cache_min_compile_time_secs == math.inf  # writes nothing


@pytest.mark.parametrize("folder", ["", "gs://bucket/xla"])
def test_no_folder_or_one_in_a_cloud_is_left_to_jax(set_up, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set_up(folder) == ""
    assert not list(tmp_path.iterdir())


def test_programs_are_kept_in_the_folder_where_it_can_be_written(set_up, tmp_path, monkeypatch):
    set_up(tmp_path)
    assert stored_programs._folder == tmp_path / "programs"
    set_up("")
    assert stored_programs._folder is None
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    set_up(tmp_path / "other")
    assert stored_programs._folder == tmp_path / "other" / "programs"
