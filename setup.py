"""Compiles the library of the CPU kernels into the package, where there is a C compiler.

Everything else is in `pyproject.toml`. Without a compiler nothing fails: the kernels look for one
when they are first used, and do without.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = "gemma_kernels.quantized_matmul.cpu"
SOURCES = Path(__file__).parent / "kernels" / PACKAGE.replace(".", "/")


class BuildWithLibrary(build_py):
    """Python files as they are, and the library beside them."""

    library = None

    def run(self):
        super().run()
        if os.environ.get("GEMMA_KERNELS_CPU") == "off":
            return
        in_place = getattr(self, "editable_mode", False)
        folder = SOURCES if in_place else Path(self.build_lib, PACKAGE.replace(".", "/"))
        for old in folder.glob("matmul-*.so"):
            old.unlink()
        try:
            self.library = runpy.run_path(str(SOURCES / "build.py"))["build"](folder)
        except OSError as reason:
            self.warn(f"no library for quantised products on CPUs: {reason}")


class PlatformWheel(bdist_wheel):
    """For one platform and every Python, as the library asks for no Python; without it, for all."""

    def get_tag(self):
        built = self.get_finalized_command("build_py").library
        return "py3", "none", super().get_tag()[2] if built else "any"


class WithLibrary(Distribution):
    """Goes where files of one platform go."""

    def has_ext_modules(self):
        return True


setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
