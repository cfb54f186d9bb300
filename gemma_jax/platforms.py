"""Which platforms JAX looks for: not a TPU that is not there.

The extra `plan` brings libtpu as a compiler, to machines without a TPU. JAX takes it for a driver:
at the first array it looks for the TPU, for seconds, and libtpu complains at length on stderr. On a
TPU VM JAX chooses the platform itself when it is imported; this is the other half of that.

The rule: JAX is told that there is the CPU alone, if
- nobody has chosen (`JAX_PLATFORMS`, even empty, or `jax.config`), and
- libtpu is installed, and
- nothing says that there is a TPU: no device file, no variable of its environment, and
- no plugin for other accelerators is installed.
In all other cases its settings stay as they are.
"""

import importlib.util
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

import jax

DEVICES = ("dev/accel*", "dev/vfio/[0-9]*")  # of TPU VMs up to v4, and of later ones
# Set by importing JAX, with libtpu or without a TPU.
NOT_TELLING = ("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY")


def leave_out_absent_tpu() -> None:
    """Keeps JAX from looking for a TPU where there is none; must come before the first array."""
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None and _cpu_alone():
        jax.config.update("jax_platforms", "cpu")


def _cpu_alone() -> bool:
    return (
        importlib.util.find_spec("libtpu") is not None
        and not tpu_may_be_here(os.environ)
        and "PJRT_NAMES_AND_LIBRARY_PATHS" not in os.environ
        and importlib.util.find_spec("jax_plugins") is None
        and not entry_points(group="jax_plugins")
    )


def tpu_may_be_here(environment: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether anything on this machine speaks of a TPU."""
    named = any(name.startswith("TPU_") and name not in NOT_TELLING for name in environment)
    forced = "JAX_FORCE_TPU_INIT" in environment
    return named or forced or any(next(root.glob(pattern), None) for pattern in DEVICES)
