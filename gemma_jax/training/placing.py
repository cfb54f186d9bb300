"""Where a run's arrays lie on a mesh: what is trained, what is not, an optimizer's state, batches.

Runs put arrays there, and the planner compiles for shapes that lie there.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gemma_jax.sharding import Partition
from gemma_jax.training.lora import MAGNITUDE, SCALE
from gemma_jax.training.moments import placed_like
from gemma_jax.training.state import TrainState
from gemma_jax.training.trainable import Trainable
from gemma_jax.weights.adapted import Adapted
from gemma_jax.weights.tree import flat_params


def place_parts(parts: Trainable, partition: Partition) -> Trainable:
    """The parts of one model by their letters; factors lie beside the parts of their weight.

    Args:
      parts: What `trainable` returns, or adapters; of arrays, or of shapes.
    """
    model = jax.eval_shape(parts.join, parts.trained, parts.frozen)
    known = {}
    for path, param in flat_params(model).items():
        shardings = partition.param_shardings(param)
        if isinstance(shardings, Adapted):
            known |= {(*path, name): getattr(shardings, name) for name in ("a", "b", SCALE)}
            known |= {path: shardings.base, (*path, MAGNITUDE): shardings.gain}
        else:
            known[path] = shardings
    trained = {path: _at(value, known[path]) for path, value in parts.trained.items()}
    frozen = {path: _at(value, known[path]) for path, value in parts.frozen.items()}
    return parts._replace(trained=trained, frozen=frozen)


def state_shardings(state: TrainState, partition: Partition) -> TrainState:
    """A sharding for every array of a state: those of moments are their parameters'.

    Args:
      state: Whose trained arrays, or shapes, lie where they belong.
    """
    whole = partition.whole
    placed = jax.tree.map(lambda a: whole, state)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state.moments)
    moments = jax.tree.map(lambda a: a.sharding, placed_like(shapes, state.trained, whole))
    trained = {path: array.sharding for path, array in state.trained.items()}
    return replace(placed, trained=trained, moments=moments)


def batch_shardings(
    batch: Any, partition: Partition, *, stacked: int = 0, processes: int = 1
) -> Any:
    """A sharding for every array of a batch: rows, and the items in them, by the rule of `B`.

    What the devices of that rule do not divide is whole on every one of them.

    Args:
      stacked: Axes in front of the rows: 1 with micro-batches.
      processes: How many of them hold as many rows as this one.
    """
    axes = partition.axes("B")

    def of(path: Any, array: Any) -> NamedSharding:
        if not axes or not _has_rows(path, array, stacked):
            return partition.whole
        if array.shape[stacked] * processes % _count(partition, axes):
            return partition.whole
        return NamedSharding(partition.mesh, PartitionSpec(*[None] * stacked, axes))

    return jax.tree_util.tree_map_with_path(of, batch)


def place_batch(batch: Any, partition: Partition, *, stacked: int = 0) -> Any:
    """The batch on the devices of the mesh.

    Of several processes each gives its own rows, which follow those of the process before; what
    is no row is the same in all of them.
    """
    processes = jax.process_count()
    shardings = batch_shardings(batch, partition, stacked=stacked, processes=processes)
    if processes == 1:
        return jax.device_put(batch, shardings)

    def place(path: Any, array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        if _has_rows(path, array, stacked):
            return _place_rows(array, sharding, stacked, processes)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(place, batch, shardings)


def _place_rows(array: np.ndarray, sharding: NamedSharding, axis: int, processes: int) -> jax.Array:
    """Rows of all processes; they are exchanged if devices need others than their own process'."""
    share = array.shape[axis]
    shape = (*array.shape[:axis], share * processes, *array.shape[axis + 1 :])

    def has_its_own(device: jax.Device, index: tuple[slice, ...]) -> bool:
        start, stop, _ = index[axis].indices(shape[axis])
        return share * device.process_index <= start and stop <= share * (device.process_index + 1)

    if all(has_its_own(*of) for of in sharding.devices_indices_map(shape).items()):
        return jax.make_array_from_process_local_data(sharding, array, shape)
    rows = np.concatenate(multihost_utils.process_allgather(array), axis)
    return jax.make_array_from_callback(shape, sharding, lambda index: rows[index])


def _has_rows(path: Any, array: Any, stacked: int) -> bool:
    """Whether this leaf of a batch has an axis of rows, or of items in them, after those."""
    name = getattr(path[-1], "name", "") if path else ""
    return not name.endswith("_L") and array.ndim > stacked


def _count(partition: Partition, axes: tuple[str, ...]) -> int:
    count = 1
    for axis in axes:
        count *= partition.mesh.shape[axis]
    return count


def _at(value: Any, shardings: Any) -> Any:
    """A weight there: arrays are sent, shapes say so."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value)):
        return jax.tree.map(lambda a, sharding: a.update(sharding=sharding), value, shardings)
    return jax.device_put(value, shardings)
