"""Compiles the library; needs nothing but Python and a C compiler.

`setup.py` reads this file when the package is installed, `library.py` when it is first used.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("matmul.c", "tiles.h", "xla_ffi.h")
# No instructions are named here: the library holds several sets, and chooses when it runs.
FLAGS = ("-O3", "-std=gnu11", "-g0", "-shared", "-fvisibility=hidden", "-Wno-psabi")
NOT_ON_WINDOWS = ("-fPIC",)
COMPILERS = ("cc", "gcc", "clang")


def file_name() -> str:
    """The library's name, which changes with its sources."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return f"matmul-{digest.hexdigest()[:12]}.so"


def compiler() -> list[str]:
    """The words that call a C compiler: `$CC`, or the first that is found; GCC or Clang.

    Raises:
      OSError: There is none.
    """
    if named := os.environ.get("CC"):
        return shlex.split(named)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise OSError("no C compiler (cc, gcc, clang) was found")


def build(folder: Path) -> Path:
    """Compiles the library into a folder, where it appears at once or not at all.

    Raises:
      OSError: There is no compiler, it failed, or the folder cannot be written.
    """
    command = [*compiler(), *FLAGS]
    windows = sys.platform == "win32" or any("windows" in word for word in command)
    command += () if windows else NOT_ON_WINDOWS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        made = Path(scratch) / "library.so"
        command += ["-o", str(made), str(FOLDER / "matmul.c")]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not made.exists():
            said = (done.stderr or done.stdout).strip().splitlines()
            reason = next((line for line in said if "error" in line), said[-1] if said else "")
            raise OSError(f"{command[0]} failed: {reason.strip()}")
        os.replace(made, folder / file_name())
    return folder / file_name()
