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
      memory: Bytes; of a GPU those that CUDA offers to programs.
      bandwidth: Bytes per second of its memory.
      links: Bytes per second to all other devices together, in both directions.
      peak: Operations per second of its matrix units, bfloat16 (float16 on a T4), without sparsity.
    """

    memory: int
    bandwidth: float
    links: float
    peak: float


GIB = 2**30
# Speeds from data sheets of the manufacturer: SXM versions where there are several. Memory as CUDA
# tells programs (cudaMemGetInfo), which PyTorch quotes when there is not enough ("GPU 0 has a total
# capacity of 22.03 GiB", ArcInstitute/evo2 issue 190); the least that was found, as drivers differ.
# nvidia-smi shows 1 to 5% more: 15,360 MiB for a T4, 23,034 for an L4, 40,960 and 81,920 for an
# A100, 81,559 for an H100 (modal-labs/modal-client pull request 2797), 143,771 for an H200.
GPUS = {
    "t4": Device(int(14.56 * GIB), 320e9, 32e9, 65e12),
    "l4": Device(int(22.03 * GIB), 300e9, 64e9, 121e12),
    "a100-40gb": Device(int(39.38 * GIB), 1555e9, 600e9, 312e12),
    "a100": Device(int(79.14 * GIB), 2039e9, 600e9, 312e12),
    "h100": Device(int(79.10 * GIB), 3350e9, 900e9, 989e12),
    "h200": Device(int(139.72 * GIB), 4800e9, 900e9, 989e12),
}
# The share of a GPU's memory that JAX takes for arrays and temporaries, unless the variable
# XLA_CLIENT_MEM_FRACTION says otherwise (docs.jax.dev, "GPU memory allocation"). The rest is for
# CUDA itself, libraries and other programs. For TPUs the compiler keeps a reserve of its own, and
# refuses what is too large.
GPU_MEMORY_FRACTION = 0.75

HOPPER = ("h100", "h200")


@dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
      name: As the user spells it: `v5e:4x4`, `gpu:h100x8`.
      count: Devices as JAX sees them.
      device: One of them.
      compiles: Whether the compiler for it is here: libtpu, or for Hopper GPUs JAX's CUDA plugin.
      memory_fraction: The share of a device's memory that a program may use.
    """

    name: str
    count: int
    device: Device
    compiles: bool
    memory_fraction: float = 1.0

    @property
    def usable_bytes(self) -> int:
        """Bytes of a device that are for weights, caches and temporaries."""
        return int(self.device.memory * self.memory_fraction)

    @property
    def is_gpu(self) -> bool:
        return self.name.startswith("gpu:")

    @property
    def devices(self) -> list[jax.Device]:
        """To compile for; they need not be there."""
        if not self.is_gpu:
            return list(slice_devices(self.name))
        kind, device = _kind(self.name)[0].upper(), self.device
        return list(sass.hopper_devices(self.count, kind, device.memory, device.bandwidth))


@cache
def find_topology(name: str, memory_fraction: float | None = None) -> Topology:
    """The machine of that name.

    Args:
      memory_fraction: The share of a GPU's memory that JAX may take, as XLA_CLIENT_MEM_FRACTION
        would say on that machine. Default: `GPU_MEMORY_FRACTION`.

    Raises:
      ValueError: No such machine; lists those that are known. A share of something else.
      ImportError: It is a TPU, and libtpu is not installed.
    """
    if (gpus := _kind(name)) is not None:
        kind, count = gpus
        if kind in GPUS:
            compiles = kind in HOPPER and sass.missing() is None
            share = GPU_MEMORY_FRACTION if memory_fraction is None else memory_fraction
            if not 0 < share <= 1:
                raise ValueError(f"{memory_fraction=} must be above 0 and at most 1")
            return Topology(name, count, GPUS[kind], compiles, share)
    elif (kind := name.partition(":")[0]) in CHIPS and re.fullmatch(r"\w+:\d+(x\d+){1,2}", name):
        if memory_fraction is not None:
            raise ValueError(f"{memory_fraction=} is about GPUs; TPUs have no such setting")
        chip = CHIPS[kind]
        peak = 2 * chip.macs * chip.clock * chip.cores
        device = Device(chip.memory, chip.bandwidth, chip.links, peak)
        return Topology(name, len(slice_devices(name)), device, compiles=True)
    hint = f"did you mean gpu:{name}x1? " if name in GPUS else ""
    raise ValueError(
        f"unknown topology {name!r}; {hint}give a TPU slice ({', '.join(CHIPS)}, as in v5e:4x4 or "
        f"v5p:2x2x2) or GPUs ({', '.join(GPUS)}, as in gpu:h100x8)"
    )


def _kind(name: str) -> tuple[str, int] | None:
    """`gpu:h100x8` -> h100 and 8."""
    match = re.fullmatch(r"gpu:([a-z][\w-]*?)(?:x([1-9]\d*))?", name)
    return match and (match[1], int(match[2] or 1))


def peak_operations(device_kind: str) -> float | None:
    """Operations per second of a device by the name that JAX gives it; `None` for unknown ones.

    >>> peak_operations("NVIDIA H100 80GB HBM3") == GPUS["h100"].peak
    True
    """
    for chip in CHIPS.values():
        if device_kind == chip.kind:
            return 2 * chip.macs * chip.clock * chip.cores
    words = device_kind.lower().replace("-", " ").split()
    if "h100" in words and {"pcie", "nvl"} & set(words):
        return None  # slower than the figures above, which are those of SXM
    found = [name for name in GPUS if name.partition("-")[0] in words]
    if "a100" in found and "40gb" in words:
        return GPUS["a100-40gb"].peak
    return GPUS[found[0]].peak if found else None
