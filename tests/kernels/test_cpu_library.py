"""Finding, building and doing without the library for products with tiles on CPUs."""

import logging
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma_kernels.quantized_matmul import quantized_matmul
from gemma_kernels.quantized_matmul.cases import CASES
from gemma_kernels.quantized_matmul.cpu import build, instructions, library


@pytest.fixture
def found_anew(monkeypatch, tmp_path):
    """Looks for the library again, in an empty cache; afterwards as before."""
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(build, "FOLDER", sources_alone(tmp_path))
    library._library.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    library._library.cache_clear()


def sources_alone(tmp_path: Path) -> Path:
    """The sources as a fresh clone has them: nothing installed."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in build.SOURCES:
        (folder / name).write_bytes((build.FOLDER / name).read_bytes())
    return folder


def test_turned_off_everything_runs_in_xla(found_anew, monkeypatch, caplog):
    monkeypatch.setenv(library.VARIABLE, "off")
    case = CASES[0]
    w, x = case.matrix().to_tiles(), case.x(3)
    with pytest.raises(NotImplementedError, match="GEMMA_KERNELS_CPU=off"):
        quantized_matmul(x, w, implementation="cpu")
    expected = quantized_matmul(x, w, implementation="reference")
    np.testing.assert_allclose(quantized_matmul(x, w), expected, atol=1e-4)
    assert not caplog.records and not found_anew.exists()


@pytest.mark.parametrize(
    "compiler, said",
    [("false", "false failed"), ("no-such-compiler", "no-such-compiler"), (None, "no C compiler")],
)
def test_without_a_compiler_one_line_says_so(found_anew, monkeypatch, caplog, compiler, said):
    monkeypatch.delenv("CC", raising=False)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    case = CASES[0]
    w, x = case.matrix().to_tiles(), case.x(1)
    with caplog.at_level(logging.WARNING):
        first = quantized_matmul(x, w)
        quantized_matmul(x, w)
    assert len(caplog.messages) == 1 and said in caplog.messages[0]
    assert "\n" not in caplog.messages[0] and caplog.messages[0].endswith("which is slower")
    np.testing.assert_allclose(first, quantized_matmul(x, w, implementation="reference"), atol=1e-4)
    assert not found_anew.exists() or not list(found_anew.iterdir())


def test_it_is_built_once_into_the_cache(found_anew, monkeypatch):
    try:
        build.compiler()
    except OSError as reason:
        pytest.skip(str(reason))
    # Less effort than for use: seconds.
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    built = library._file()
    assert [built] == list(found_anew.iterdir()) and built.name == build.file_name()
    monkeypatch.setenv("CC", "false")
    assert library._file() == built
    source = build.FOLDER / "tiles.h"
    source.write_text(source.read_text() + "\n// changed\n")
    with pytest.raises(OSError, match="false failed"):  # a library of other sources is not used
        library._file()


def test_a_damaged_library_is_one_line(found_anew, caplog):
    found_anew.mkdir()
    (found_anew / build.file_name()).write_bytes(b"not a library")
    with pytest.raises(NotImplementedError, match="no library for quantised products"):
        library.register()
    assert len(caplog.messages) == 1


def test_unknown_instructions():
    try:
        instructions()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    with pytest.raises(NotImplementedError, match="does not have the instructions 'sse9'"):
        instructions("sse9")


LAYOUT = r"""
#include <stdio.h>
#include HEADER
#define AT(type, field) printf(#type "." #field " %zu\n", offsetof(XLA_FFI_##type, field));
#define IS(name) printf(#name " %zu\n", (size_t)(XLA_FFI_##name));
int main(void) {
  AT(Api_Version, major_version) AT(Api_Version, minor_version)
  AT(Metadata, api_version) AT(Metadata, traits) AT(Metadata_Extension, metadata)
  AT(Error_Create_Args, message) AT(Error_Create_Args, errc) AT(Error_Destroy_Args, error)
  AT(ThreadPool_Schedule_Args, ctx) AT(ThreadPool_Schedule_Args, task)
  AT(ThreadPool_Schedule_Args, data) AT(ThreadPool_NumThreads_Args, num_threads)
  AT(Api, api_version) AT(Api, XLA_FFI_Error_Create) AT(Api, XLA_FFI_Error_Destroy)
  AT(Api, XLA_FFI_ThreadPool_Schedule) AT(Api, XLA_FFI_ThreadPool_NumThreads)
  AT(Buffer, dtype) AT(Buffer, data) AT(Buffer, rank) AT(Buffer, dims)
  AT(Args, size) AT(Args, args) AT(Rets, size) AT(Rets, rets)
  AT(CallFrame, api) AT(CallFrame, ctx) AT(CallFrame, stage) AT(CallFrame, args)
  AT(CallFrame, rets)
  IS(Error_Create_Args_STRUCT_SIZE) IS(Error_Destroy_Args_STRUCT_SIZE)
  IS(ThreadPool_Schedule_Args_STRUCT_SIZE) IS(ThreadPool_NumThreads_Args_STRUCT_SIZE)
  IS(DataType_S8) IS(DataType_S32) IS(DataType_U8) IS(DataType_F16) IS(DataType_F32)
  IS(DataType_BF16) IS(Error_Code_INVALID_ARGUMENT) IS(Error_Code_RESOURCE_EXHAUSTED)
  IS(ExecutionStage_EXECUTE) IS(API_MAJOR)
}
"""


def test_structs_lie_as_the_installed_jaxlib_has_them(tmp_path):
    try:
        compiler = build.compiler()
    except OSError as reason:
        pytest.skip(str(reason))
    theirs = Path(jax.ffi.include_dir())
    (tmp_path / "layout.c").write_text(LAYOUT)

    def layout(header: Path) -> bytes:
        command = [*compiler, f"-I{theirs}", f'-DHEADER="{header}"', "layout.c", "-o", "layout"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return subprocess.run(["./layout"], cwd=tmp_path, check=True, capture_output=True).stdout

    ours = layout(build.FOLDER / "xla_ffi.h")
    assert ours.count(b"\n") == 44
    assert ours == layout(theirs / "xla/ffi/api/c_api.h")
