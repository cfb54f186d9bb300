"""Programs that a start reads instead of tracing and compiling them."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax.inference import stored_programs
from gemma_jax.inference.stored_programs import StoredProgram


@partial(jax.jit, static_argnames=("times",))
def scaled(state, factor, *, times=1):
    return {"x": state["x"] * factor * times + jnp.sin(state["x"])}


class Counted:
    """A jitted function that counts how often it had to be compiled, or was called itself."""

    __module__, __name__ = __name__, "scaled"

    def __init__(self):
        self.compiled = self.called = 0

    def lower(self, *args, **static):
        self.compiled += 1
        return scaled.lower(*args, **static)

    def __call__(self, *args, **static):
        self.called += 1
        return scaled(*args, **static)


STATE, FACTOR = {"x": np.arange(6, dtype=np.float32)}, np.float32(3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is in use, on one device; the tests themselves have eight."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(stored_programs, "_folder", tmp_path / "programs")
    return tmp_path / "programs"


def start(state=STATE, **static):
    """A new process, as far as programs go: what it finds, and how often it compiled."""
    counted = Counted()
    found = StoredProgram(counted, like=0)(state, FACTOR, **static)
    assert not counted.called
    np.testing.assert_array_equal(found["x"], scaled(state, FACTOR, **static)["x"])
    return counted.compiled


def only(folder):
    (file,) = folder.iterdir()
    return file


def test_the_second_start_compiles_nothing(folder, capsys):
    assert [start(), start(), start()] == [1, 0, 0]
    assert only(folder).name.startswith("scaled-")
    assert capsys.readouterr().err == ""


def test_one_process_looks_once(folder):
    counted = Counted()
    program = StoredProgram(counted, like=0)
    program(STATE, FACTOR)
    only(folder).unlink()
    program(STATE, FACTOR)
    assert counted.compiled == 1 and not list(folder.iterdir())


def test_nothing_is_kept_until_a_folder_is_named(monkeypatch):
    monkeypatch.setattr(stored_programs, "_folder", None)
    counted = Counted()
    StoredProgram(counted, like=0)(STATE, FACTOR)
    assert (counted.called, counted.compiled) == (1, 0)


@pytest.mark.parametrize(
    "state, static",
    [
        ({"x": np.ones(7, np.float32)}, {}),
        ({"x": np.ones(6, np.int32)}, {}),
        (STATE, {"times": 2}),
    ],
    ids=["shape", "dtype", "static"],
)
def test_other_arguments_are_another_program(folder, state, static):
    start()
    assert start(state, **static) == 1


@pytest.mark.parametrize("name", ["sources", "versions", "flags", "processor"])
def test_a_stale_program_is_not_read(folder, monkeypatch, name):
    start()
    found = list(stored_programs._surroundings())
    found[["sources", "versions", "flags", "processor"].index(name)] += " of another day"
    monkeypatch.setattr(stored_programs, "_surroundings", lambda: tuple(found))
    assert [start(), start()] == [1, 0]


def test_a_setting_of_jax_is_part_of_the_key(folder):
    start()
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    try:
        assert start() == 1
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:-9] + b"?" + data[-8:]],
    ids=["empty", "cut off", "changed"],
)
def test_a_damaged_program_is_made_anew_with_one_line(folder, capsys, damage):
    start()
    file = only(folder)
    file.write_bytes(damage(file.read_bytes()))
    assert start() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the program {file} is damaged") and line.endswith("compiled anew")
    assert start() == 0 and capsys.readouterr().err == ""


def test_what_jax_cannot_load_is_made_anew(folder, capsys):
    start()
    data = b"written whole, and no program"
    only(folder).write_bytes(stored_programs.hashlib.sha256(data).digest() + data)
    assert [start(), start()] == [1, 0]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_where_nothing_can_be_written_jax_compiles_by_itself(folder, monkeypatch, capsys):
    folder.write_text("a file in its place")
    counted = Counted()
    StoredProgram(counted, like=0)(STATE, FACTOR)
    assert (counted.called, counted.compiled) == (1, 0)
    assert capsys.readouterr().err == ""


def test_what_is_in_a_read_only_folder_is_read(folder, monkeypatch, capsys):
    start()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert start() == 0
    counted = Counted()
    StoredProgram(counted, like=0)(STATE, FACTOR, times=2)
    assert (counted.called, counted.compiled) == (1, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_files_of_others_are_not_read(folder, monkeypatch):
    start()
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert start() == 1


def test_starts_at_the_same_time_leave_one_whole_program(folder, capsys):
    with ThreadPoolExecutor(4) as pool:
        assert all(n in (0, 1) for n in pool.map(lambda _: start(), range(8)))
    assert only(folder) and start() == 0
    assert capsys.readouterr().err == ""


def test_the_oldest_make_room(folder, monkeypatch):
    monkeypatch.setattr(stored_programs, "MOST", 2)
    for times in (1, 2, 3):
        start(times=times)
        for age, file in enumerate(sorted(folder.iterdir(), key=lambda f: -f.stat().st_mtime_ns)):
            os.utime(file, (1000 - age, 1000 - age))
    assert len(list(folder.iterdir())) == 2
    assert [start(times=3), start(times=1)] == [0, 1]


def test_jax_keeps_its_own_cache(folder):
    before = jax.config.jax_enable_compilation_cache
    start()
    assert jax.config.jax_enable_compilation_cache == before


def test_a_model_says_the_same_from_the_folder(folder, monkeypatch):
    model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
    write = partial(gj.generate, model, tok, "Which digit is left?", max_new_tokens=4, stop_ids=())
    made, read = write(), write()
    assert only(folder).name.startswith("advance-")
    monkeypatch.setattr(stored_programs, "_folder", None)
    assert made == read == write()
