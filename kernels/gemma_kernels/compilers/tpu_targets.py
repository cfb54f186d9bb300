"""TPUs to compile for, whether or not one is there: their figures, and the way to their compiler.

libtpu brings the compiler (`pip install "gemma-jax[plan]"`); no TPU is needed for it.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Chip:
    """Figures of one device as JAX sees it: a chip, of tpu7x half a chip.

    Attributes:
      topology: A small slice that the compiler knows.
      kind: `device_kind` of its devices.
      cores: Cores of a device; a kernel's grid is spread over them.
      macs: Multiply-accumulates per cycle of a core's matrix units, bfloat16.
      clock: Cycles per second, as they follow from the published peak.
      bandwidth: Bytes per second of a device's memory.
      memory: Bytes of a device's memory.
      links: Bytes per second from a device to all its neighbours together, in both directions.
    """

    topology: str
    kind: str
    cores: int
    macs: int
    clock: float
    bandwidth: float
    memory: int
    links: float


CHIPS = {
    "v5e": Chip("v5e:2x2", "TPU v5 lite", 1, 65_536, 1.50e9, 819e9, 16 * 2**30, 200e9),
    "v5p": Chip("v5p:2x2x1", "TPU v5", 2, 65_536, 1.75e9, 2765e9, 95 * 2**30, 600e9),
    "v6e": Chip("v6e:2x2", "TPU v6 lite", 1, 262_144, 1.75e9, 1640e9, 32 * 2**30, 448e9),
    "tpu7x": Chip("tpu7x:2x2x1", "TPU7x", 1, 262_144, 2.20e9, 3690e9, 96 * 2**30, 600e9),
}


def one_device(chip: str) -> NamedSharding:
    """Everything on one device of a chip out of `CHIPS`, or of a topology (`"v5e:4x4"`).

    Raises:
      ValueError: No such chip or topology.
      ImportError: libtpu is not installed.
    """
    devices = slice_devices(CHIPS[chip].topology if chip in CHIPS else chip)
    return NamedSharding(Mesh(devices[:1], ("x",)), PartitionSpec())


@cache
def slice_devices(topology: str) -> tuple[jax.Device, ...]:
    """The devices of a slice such as `v5e:4x4`, to compile for; they need not be there.

    Raises:
      ValueError: No such slice.
      ImportError: libtpu is not installed.
    """
    from jax.experimental import topologies

    if ":" not in topology:
        raise ValueError(f"unknown TPU {topology!r}; choose one of: {', '.join(CHIPS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for a TPU needs libtpu: pip install 'gemma-jax[plan]'")
    os.environ.update(WITHOUT_A_TPU)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of several kinds, by version
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"the compiler knows no TPU slice {topology!r}: {reason}") from error
    return tuple(description.devices)


# Without these libtpu looks for a TPU, and a second process waits for the first.
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def lower(function: Callable, chip: str, *args) -> jax.stages.Lowered:
    """`function` for one device of `chip`; `args` are arrays, or their shapes and dtypes."""
    sharding = one_device(chip)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    # The mesh in context tells kernels which chip they are for.
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return jax.jit(function, out_shardings=sharding).lower(*args)
