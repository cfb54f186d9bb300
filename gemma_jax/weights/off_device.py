"""Tables whose rows are looked up where they lie, off the accelerator.

They stand in the place of an array in a Param: `table[ids]` gives the rows, on the device, and
nothing else of the table ever gets there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.compat import on_host

Place = Literal["device", "host", "disk"]
HOST_KINDS = ("pinned_host", "unpinned_host")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HostTable:
    """An array in the host's memory, next to a device.

    Attributes:
      values: `[V, ...]`; bfloat16 as its uint16 bits, since XLA's CPU backend converts all of a
        bfloat16 table before it gathers rows of it.
    """

    values: jax.Array

    @classmethod
    def of(cls, array: np.ndarray) -> "HostTable":
        """The array in host memory, without a way through the device.

        Raises:
          ValueError: The backend knows no such memory.
        """
        bits = array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
        return cls(jax.device_put(bits, host_sharding(), may_alias=True))

    def __getitem__(self, ids: jax.Array) -> jax.Array:
        """Rows `[*ids.shape, ...]`: gathered on the host, then sent to the device."""
        rows = _gather(self.values, ids)
        if rows.dtype == jnp.uint16:
            return jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
        return rows


@jax.jit
def _gather(values: jax.Array, ids: jax.Array) -> jax.Array:
    ids = jax.device_put(ids, jax.memory.Space.Host)
    rows = on_host(lambda values, ids: values[ids])(values, ids)
    return jax.device_put(rows, jax.memory.Space.Device)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiskTable:
    """Rows of a file that is mapped into memory: the system reads those that are asked for.

    Attributes:
      rows: `ids -> [*ids.shape, *shape]`, NumPy. Compared by identity.
      shape: Of one row.
    """

    rows: Callable[[np.ndarray], np.ndarray] = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})

    @classmethod
    def of(cls, mapped: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> "DiskTable":
        """A table out of a mapped `[V, product of shape]`, whose rows become `dtype`."""

        def rows(ids: np.ndarray) -> np.ndarray:
            ids = np.asarray(ids)
            return np.asarray(mapped[ids]).reshape(*ids.shape, *shape).astype(dtype)

        return cls(rows, shape, dtype)

    def __getitem__(self, ids: jax.Array) -> jax.Array:
        """Rows `[*ids.shape, *shape]`, read by the host while the device waits."""
        result = jax.ShapeDtypeStruct((*ids.shape, *self.shape), self.dtype)
        return jax.pure_callback(self.rows, result, ids, vmap_method="expand_dims")


def host_sharding() -> jax.sharding.Sharding:
    """The memory of the host, as the default device sees it.

    Raises:
      ValueError: The backend knows no such memory.
    """
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    for kind in HOST_KINDS:
        if kind in kinds:
            return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
    raise ValueError(
        f"no host memory to place the per-layer table in: {device.platform} has "
        f"{', '.join(sorted(kinds))}; leave it on the device, or on disk"
    )
