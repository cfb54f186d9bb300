"""Makes a wheel for each platform on one machine, with Zig's C compiler.

python -m venv .venv-wheels && .venv-wheels/bin/pip install ziglang
.venv-wheels/bin/python kernels/build_wheels.py [FOLDER] [PLATFORM ...]
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ziglang

ROOT = Path(__file__).parents[1]
# The wheel's name of a platform, and Zig's, with the oldest system it runs on.
PLATFORMS = {
    "manylinux2014_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux2014_aarch64": "aarch64-linux-gnu.2.17",
    "macosx_11_0_x86_64": "x86_64-macos.11.0",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "win_amd64": "x86_64-windows-gnu",
}


def build_wheel(platform: str, folder: Path) -> None:
    """Builds the wheel of a platform into a folder.

    Raises:
      subprocess.CalledProcessError: It could not be built, or has no library.
    """
    # Not by way of Python: the one that builds a wheel sees nothing of this environment.
    zig = shutil.which("zig", path=str(Path(ziglang.__file__).parent))
    compiler = f"{shlex.quote(zig)} cc -target {PLATFORMS[platform]}"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    command += [f"--config-settings=--build-option=--plat-name={platform}", str(ROOT)]
    subprocess.run(command, check=True, env=os.environ | {"CC": compiler})
    if not list(folder.glob(f"*-py3-none-{platform}.whl")):
        raise SystemExit(f"the wheel for {platform} came out without the library")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "dist")
    for platform in sys.argv[2:] or PLATFORMS:
        build_wheel(platform, folder)
