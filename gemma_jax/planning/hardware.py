"""Machines to plan for: slices of TPUs, and GPUs; programs are compiled for those whose compiler is
installed, and others known by their figures."""

import re
from dataclasses import dataclass
from functools import cache

import jax

from gemma_kernels.compilers import hopper_sass as sass
from gemma_kernels.compilers.tpu_targets import CHIPS, slice_devices


@dataclass(frozen=True)
class Device:
    """One device as JAX sees it.

    Attributes:
      memory: Bytes.
      bandwidth: Bytes per second of its memory.
      links: Bytes per second to all other devices together, in both directions.
      peak: Operations per second of its matrix units, bfloat16 (float16 on a T4), without sparsity.
    """

    memory: int
    bandwidth: float
    links: float
    peak: float


GIB = 2**30
# Data sheets of the manufacturer: SXM versions where there are several.
GPUS = {
    "t4": Device(16 * GIB, 320e9, 32e9, 65e12),
    "l4": Device(24 * GIB, 300e9, 64e9, 121e12),
    "a100": Device(80 * GIB, 2039e9, 600e9, 312e12),
    "h100": Device(80 * GIB, 3350e9, 900e9, 989e12),
    "h200": Device(141 * 10**9, 4800e9, 900e9, 989e12),
}


HOPPER = ("h100", "h200")


@dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
      name: As the user spells it: `v5e:4x4`, `gpu:h100x8`.
      count: Devices as JAX sees them.
      device: One of them.
      compiles: Whether the compiler for it is here: libtpu, or for Hopper GPUs JAX's CUDA plugin.
    """

    name: str
    count: int
    device: Device
    compiles: bool

    @property
    def devices(self) -> list[jax.Device]:
        """To compile for; they need not be there."""
        if not self.name.startswith("gpu:"):
            return list(slice_devices(self.name))
        kind, device = _kind(self.name)[0].upper(), self.device
        return list(sass.hopper_devices(self.count, kind, device.memory, device.bandwidth))


@cache
def find_topology(name: str) -> Topology:
    """The machine of that name.

    Raises:
      ValueError: No such machine; lists those that are known.
      ImportError: It is a TPU, and libtpu is not installed.
    """
    if (gpus := _kind(name)) is not None:
        kind, count = gpus
        if kind in GPUS:
            compiles = kind in HOPPER and sass.missing() is None
            return Topology(name, count, GPUS[kind], compiles)
    elif (kind := name.partition(":")[0]) in CHIPS and re.fullmatch(r"\w+:\d+(x\d+){1,2}", name):
        chip = CHIPS[kind]
        peak = 2 * chip.macs * chip.clock * chip.cores
        device = Device(chip.memory, chip.bandwidth, chip.links, peak)
        return Topology(name, len(slice_devices(name)), device, compiles=True)
    raise ValueError(
        f"unknown topology {name!r}; give a TPU slice ({', '.join(CHIPS)}, as in v5e:4x4 or "
        f"v5p:2x2x2) or GPUs ({', '.join(GPUS)}, as in gpu:h100x8)"
    )


def _kind(name: str) -> tuple[str, int] | None:
    """`gpu:h100x8` -> h100 and 8."""
    match = re.fullmatch(r"gpu:([a-z]\w*?)(?:x([1-9]\d*))?", name)
    return match and (match[1], int(match[2] or 1))
