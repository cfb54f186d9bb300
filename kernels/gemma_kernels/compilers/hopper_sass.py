"""Kernels for Hopper compiled to machine code without a GPU, and what the compiler says of them.

The CUDA plugin of JAX (`pip install "jax[cuda13]"`, or its `jax-cuda13-plugin` and
`jax-cuda13-pjrt` alone) brings the compiler, which needs a description of the device but no device.
Instructions are counted if `nvdisasm` is found: on the path, or in the `triton` wheel.
"""

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# As XLA describes an H100 (xla/tools/hlo_opt/gpu_specs/h100_sxm.txtpb).
_DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: %d
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: %d
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA %s"
"""


@dataclass(frozen=True)
class Kernel:
    """One compiled Mosaic GPU kernel.

    Attributes:
      registers: Per thread at entry; kernels move them among warpgroups later.
      spilled: Bytes per thread written to and read from memory for want of registers.
      shared: Bytes of shared memory of a block, without barriers; `None` on jax 0.10, which does
        not say. More than there are do not compile.
      products: `wgmma` instructions.
      instructions: Machine instructions by their first word, or `None` without nvdisasm.
    """

    name: str
    registers: int
    spilled: int
    shared: int | None
    products: int
    instructions: dict[str, int] | None


def missing() -> str | None:
    """Why nothing can be compiled here, or `None`."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "compiling for a GPU needs the CUDA plugin: pip install 'jax[cuda13]'"
    return None


@cache
def hopper_devices(
    count: int = 1,
    name: str = "H200",
    memory: int = 141_000_000_000,
    bandwidth: float = 4.8e12,
) -> tuple[jax.Device, ...]:
    """GPUs of one machine, to compile for; they need not be there.

    Args:
      name: `"H100"` or `"H200"`.
      memory, bandwidth: Of one of them, in bytes and bytes per second.

    Raises:
      ImportError: The CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    if reason := missing():
        raise ImportError(reason)
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name.lower(),
        topology=f"1x1x{count}",
        target_config=_DEVICE % (bandwidth, memory, name),
    )
    return tuple(topology.devices)


def compile_for_hopper(function: Callable, *args) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """`function` for an H200; `args` are arrays, or their shapes and dtypes."""
    sharding = NamedSharding(Mesh(hopper_devices(), ("x",)), PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with tempfile.TemporaryDirectory() as folder, _dumps(Path(folder)):
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
            compiled = jax.jit(function, out_shardings=sharding).lower(*args).compile()
        return compiled, [_read(path) for path in sorted(Path(folder).glob("*.ptxas"))]


@contextmanager
def _dumps(folder: Path) -> Iterator[None]:
    """Mosaic GPU leaves what it made in `folder`."""
    kinds = ("PTX", "PTXAS", "SASS") if (nvdisasm := _nvdisasm()) else ("PTX", "PTXAS")
    settings = {"MOSAIC_GPU_DUMP_TO": str(folder)} | {f"MOSAIC_GPU_DUMP_{x}": "1" for x in kinds}
    if nvdisasm:
        (folder / "cuda/bin").mkdir(parents=True)
        (folder / "cuda/bin/nvdisasm").symlink_to(nvdisasm)
        settings["CUDA_ROOT"] = str(folder / "cuda")
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _nvdisasm() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
    return shutil.which("nvdisasm") or (str(bundled) if bundled and bundled.exists() else None)


def _read(log: Path) -> Kernel:
    said = log.read_text()
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    resources = log.with_suffix(".resources.txt")
    code = log.with_suffix(".sass_ctrl")
    instructions = None
    if code.exists():
        words = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z0-9]+)", code.read_text())
        instructions = {word: words.count(word) for word in sorted(set(words))}
    return Kernel(
        name=re.sub(r"_\d+$", "", log.stem),
        registers=int(re.search(r"Used (\d+) registers", said).group(1)),
        spilled=int(stores) + int(loads),
        shared=_shared(resources.read_text()) if resources.exists() else None,
        products=log.with_suffix(".ptx").read_text().count("wgmma.mma_async"),
        instructions=instructions,
    )


def _shared(resources: str) -> int:
    return int(re.search(r"smem_scratch_bytes=(\d+)", resources).group(1))
