"""Parameters under construction: memory in the final shape, dtype and place, filled by rows.

Three kinds, one use: `write(array, index)` from any thread, then `finish()` for the result.
"""

import threading
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.nn.off_device import HostTable

Shape = tuple[int, ...]
_ALIGNMENT = 64  # bytes; JAX on CPU adopts NumPy memory that is aligned so, and copies other


class Buffer(Protocol):
    def write(self, array: np.ndarray, index: Shape) -> None:
        """Puts `array` (same rank) where its first element has `index`."""
        ...

    def finish(self) -> jax.Array | HostTable: ...


def make_buffer(shape: Shape, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> Buffer:
    """Host memory that becomes the array where the default device is a CPU, else device memory."""
    if sharding is None and jax.default_backend() == "cpu":
        return HostBuffer(shape, dtype)
    return DeviceBuffer(shape, dtype, sharding)


class HostBuffer:
    """NumPy memory that JAX's CPU backend adopts as it is: no copy, and nothing to compile."""

    def __init__(self, shape: Shape, dtype: np.dtype):
        raw = np.empty(np.dtype(dtype).itemsize * int(np.prod(shape)) + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        self._array = raw[start : len(raw) - _ALIGNMENT + start].view(dtype).reshape(shape)

    def write(self, array: np.ndarray, index: Shape) -> None:
        region = tuple(slice(i, i + n) for i, n in zip(index, array.shape, strict=True))
        self._array[region] = array

    def finish(self) -> jax.Array:
        return jax.device_put(self._array, may_alias=True)


class TableBuffer(HostBuffer):
    """Stays with the host, whatever the device."""

    def finish(self) -> HostTable:
        return HostTable.of(self._array)


class DeviceBuffer:
    """An array on its device or devices, updated in place by donation."""

    def __init__(self, shape: Shape, dtype: np.dtype, sharding: jax.sharding.Sharding | None):
        self._array = jnp.zeros(shape, dtype, device=sharding)
        self._lock = threading.Lock()

    def write(self, array: np.ndarray, index: Shape) -> None:
        with self._lock:
            # Waiting holds the reading threads back: a slow device must not fill the host.
            self._array = jax.block_until_ready(_update(self._array, array, index))

    def finish(self) -> jax.Array:
        return self._array


@partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, block: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), index)
