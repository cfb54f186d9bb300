"""What differs between the versions of JAX that are supported (0.10.2 to 0.12)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on
from jax.experimental.xla_metadata import set_xla_metadata

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


def computed_once(make: Callable[[], Any]) -> Any:
    """The arrays that a function makes, written to memory before XLA's CPU backend reads them.

    It would rather compute what is cheap again in every loop that needs it: cosines and sines in
    each layer. And it compiles equal loops once, but loops are not equal if a number that tells
    them apart is written in them: twenty layers that take a row each out of one array were twenty
    loops. The results of a function that is not inlined (both attributes are XLA's) are unknown to
    the loops. A version without these attributes compiles longer, and computes the same. Other
    platforms inline the function.
    """
    if target_platform() != "cpu":
        return make()
    return set_xla_metadata(jax.jit(make)(), inlineable="false", xla_cpu_small_call="true")
