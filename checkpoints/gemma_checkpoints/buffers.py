"""Parameters under construction: memory in the final shape, dtype and place, filled by rows.

Four kinds, one use: `write(array, index)` from any thread, then `finish()` for the result.
"""

import threading
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.weights.off_device import HostTable

Shape = tuple[int, ...]
Box = tuple[range, ...]  # part of an array: the indices along each axis
_ALIGNMENT = 64  # bytes; JAX on CPU adopts NumPy memory that is aligned so, and copies other


class Buffer(Protocol):
    def write(self, array: np.ndarray, index: Shape) -> None:
        """Puts `array` (same rank) where its first element has `index`."""
        ...

    def finish(self) -> jax.Array | HostTable: ...


def make_buffer(shape: Shape, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> Buffer:
    """Host memory that becomes the array where the default device is a CPU, else device memory."""
    if sharding is not None:
        return ShardedBuffer(shape, dtype, sharding)
    kind = HostBuffer if jax.default_backend() == "cpu" else DeviceBuffer
    return kind(shape, dtype)


def local_boxes(shape: Shape, sharding: jax.sharding.Sharding | None) -> list[Box]:
    """The different parts of an array that devices of this process hold."""
    if sharding is None:
        return [tuple(map(range, shape))]
    return list(dict.fromkeys(_boxes(shape, sharding).values()))


def _boxes(shape: Shape, sharding: jax.sharding.Sharding) -> dict[jax.Device, Box]:
    indices = sharding.addressable_devices_indices_map(shape)
    return {
        device: tuple(range(n)[cut] for cut, n in zip(index, shape))
        for device, index in indices.items()
    }


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
    """An array on its device, updated in place by donation."""

    def __init__(self, shape: Shape, dtype: np.dtype, device: jax.Device | None = None):
        self._array = jnp.zeros(shape, dtype, device=device)
        self._lock = threading.Lock()

    def write(self, array: np.ndarray, index: Shape) -> None:
        with self._lock:
            # Waiting holds the reading threads back: a slow device must not fill the host.
            self._array = jax.block_until_ready(_update(self._array, array, index))

    def finish(self) -> jax.Array:
        return self._array


class ShardedBuffer:
    """A buffer for each device of this process; the array exists nowhere as a whole."""

    def __init__(self, shape: Shape, dtype: np.dtype, sharding: jax.sharding.Sharding):
        self._shape, self._sharding = shape, sharding
        self._parts = [
            (box, DeviceBuffer(tuple(map(len, box)), dtype, device))
            for device, box in _boxes(shape, sharding).items()
        ]

    def write(self, array: np.ndarray, index: Shape) -> None:
        for box, buffer in self._parts:
            cuts = [
                (max(cut.start, i), min(cut.stop, i + n))
                for cut, i, n in zip(box, index, array.shape, strict=True)
            ]
            if all(first < last for first, last in cuts):
                own = tuple(slice(first - i, last - i) for (first, last), i in zip(cuts, index))
                start = tuple(first - cut.start for (first, _), cut in zip(cuts, box))
                buffer.write(array[own], start)

    def finish(self) -> jax.Array:
        arrays = [buffer.finish() for _, buffer in self._parts]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)


@partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, block: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), index)
