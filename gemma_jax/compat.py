"""What differs between the versions of JAX that are supported (0.10.2 to 0.12)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on

from gemma_kernels.platform import target_platform


def on_host(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, run by the host in the middle of a program: arrays and result in its memory.

    What JAX 0.10 calls `compute_on2` is `compute_on` in later versions.
    """
    run_on: Callable[..., Any] = getattr(compute_on, "compute_on2", None) or compute_on.compute_on
    host = jax.memory.Space.Host
    return run_on(function, compute_type="device_host", out_memory_spaces=host)


def fuses_matrix_vector() -> bool:
    """Whether `dot(vector, convert(matrix).T)` is fast, whatever it converts from.

    XLA's CPU backend up to jax 0.11 makes one parallel vector loop of it, which never writes the
    converted matrix and beats its own matrix product by half. The emitter of jax 0.12 sums such a
    loop serially. Other backends have no need of it.
    """
    return jax.__version_info__ < (0, 12) and target_platform() == "cpu"
