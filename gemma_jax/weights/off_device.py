"""Tables whose rows are looked up where they lie, off the accelerator.

They stand in the place of an array in a Param: `rows(ids)` gives the rows, on the device, and
nothing else of the table ever gets there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.compat import on_host
from gemma_jax.weights.protocol import Index, StandIn, Weight

Place = Literal["device", "host", "disk"]
HOST_KINDS = ("pinned_host", "unpinned_host")


class OffDeviceTable(StandIn):
    """What tables off the device have in common: they are read by rows, and refuse all else."""

    def dense(self) -> jax.Array:
        """All rows, on the device."""
        return self.rows(jnp.arange(self.shape[0]))

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """Refused."""
        raise ValueError(
            f"a table off the device is read by rows, not multiplied by ({equation}); load the "
            'model with per_layer_table="device"'
        )

    def take(self, axis: int, index: Index) -> Weight:
        """Refused."""
        raise ValueError(
            "a table off the device can be viewed, not cut; load the model with "
            'per_layer_table="device" to slice it'
        )

    def array_dims(self, dims: str) -> "OffDeviceTable":
        """Refused."""
        raise ValueError(
            "a table off the device lies beside one device, and cannot be split over a mesh; load "
            'the model with per_layer_table="device"'
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HostTable(OffDeviceTable):
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

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        return self.values.shape

    def rows(self, ids: jax.Array) -> jax.Array:
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
class DiskTable(OffDeviceTable):
    """Rows of a file that is mapped into memory: the system reads those that are asked for.

    Attributes:
      read: `ids -> [*ids.shape, *row_shape]`, NumPy. Compared by identity.
      length: Number of rows.
      row_shape: Of one row.
    """

    read: Callable[[np.ndarray], np.ndarray] = field(metadata={"static": True})
    length: int = field(metadata={"static": True})
    row_shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})

    @classmethod
    def of(cls, mapped: np.ndarray, row_shape: tuple[int, ...], dtype: np.dtype) -> "DiskTable":
        """A table out of a mapped `[V, product of row_shape]`, whose rows become `dtype`."""

        def read(ids: np.ndarray) -> np.ndarray:
            ids = np.asarray(ids)
            return np.asarray(mapped[ids]).reshape(*ids.shape, *row_shape).astype(dtype)

        return cls(read, len(mapped), row_shape, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        return (self.length, *self.row_shape)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows `[*ids.shape, *row_shape]`, read by the host while the device waits."""
        result = jax.ShapeDtypeStruct((*ids.shape, *self.row_shape), self.dtype)
        return jax.pure_callback(self.read, result, ids, vmap_method="expand_dims")


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
