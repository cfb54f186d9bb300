"""Finds the library or builds it, and makes it known to XLA, when it is first asked for.

`GEMMA_KERNELS_CPU` in the environment: `off` does without it; `vnni`, `avx512`, `avxvnni`, `avx2`,
`dotprod` or `plain` are the instructions to use, where the machine has them; else it chooses.
"""

import ctypes
import logging
import os
import platform
import sys
from functools import cache
from pathlib import Path

import jax

from gemma_kernels.quantized_matmul.cpu import build

VARIABLE = "GEMMA_KERNELS_CPU"
# Names of the targets. `jax.export` asks for each as
# `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name)]`: what it exports needs them.
TARGETS = ("gemma_quantized_matmul_float", "gemma_quantized_matmul_int8")

log = logging.getLogger(__name__)


def register() -> None:
    """Makes the targets known to XLA, once.

    A program that was compiled elsewhere, and is only loaded here, needs this first.

    Raises:
      NotImplementedError: There is no library; says why.
    """
    library, reason = _library()
    if library is None:
        raise NotImplementedError(reason)


def instructions(wanted: str | None = None) -> str:
    """The set of instructions in use: `"vnni"`, `"avx512"`, `"avxvnni"`, `"avx2"`, `"dotprod"` or
    `"plain"`.

    Args:
      wanted: Use these from now on, in the whole process; `"auto"`: the best that there are.

    Raises:
      NotImplementedError: There is no library, or the machine does not have them.
    """
    register()
    name = _library()[0].gemma_quantized_matmul_instructions(wanted and wanted.encode())
    if name is None:
        raise NotImplementedError(f"this machine does not have the instructions {wanted!r}")
    return name.decode()


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, its targets registered, or the reason why there is none, which is logged."""
    asked = os.environ.get(VARIABLE, "auto")
    if asked == "off":
        return None, f"{VARIABLE}=off"
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        return None, "needs a 64-bit machine with the low byte first"
    try:
        library = ctypes.CDLL(str(_file()))
        choose = library.gemma_quantized_matmul_instructions
        choose.restype, choose.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
        if choose(asked.encode()) is None:
            raise OSError(f"{VARIABLE}={asked}: this machine does not have these instructions")
        for name in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (OSError, AttributeError) as error:
        reason = f"no library for quantised products ({error})"
        log.warning("%s: they run in plain XLA, which is slower", reason)
        return None, reason
    return library, ""


def _file() -> Path:
    """The library: as it was installed, or else out of the cache, where it is built first."""
    packaged = build.FOLDER / build.file_name()
    if packaged.exists():
        return packaged
    folder = cache_folder()
    path = folder / build.file_name()
    if not path.exists():
        log.info("compiling the library for quantised products into %s, once", folder)
        build.build(folder)
    return path


def cache_folder() -> Path:
    """Where this user's libraries for machines like this one are kept."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "gemma-kernels" / f"{sys.platform}-{platform.machine()}"
