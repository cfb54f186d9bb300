"""The contract of what may stand in a Param in the place of an array.

A weight is an array, or a `StandIn`: a pytree of arrays that multiplies, looks up and cuts itself.
All code outside of this folder uses a weight through `shape`, `nbytes` and the functions that take
either: `contract`, `lookup`, and `array_dims`, `take`, `dense`, `head_rows` of this file. So a
new format is one file with one class, and no change elsewhere.

Letters live in the Param (`dims`, and `inputs` for those it sums over), not in the stand-in: axes
for stacking layers come and go in front of all its arrays (a scan, or a `jax.tree.map` that slices
or joins them), and carry no letter. A stand-in is told the letters where it needs them.

Example: `weights/adapted.py` has the fields `base` (a weight), `a` and `b`. Its `contract` adds
`b (a x)` to `contract(equation, x, base)`, and its other methods ask `base` likewise.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, overload

import jax
import jax.numpy as jnp

from gemma_kernels.quantized_matmul import QuantizedMatrix

Index = int | tuple[int, ...]  # so many first entries, or the entries with these indices


class StandIn(ABC):
    """Stands in a Param in the place of an array; a registered pytree.

    Every method is there in every class; one that makes no sense for a class raises `ValueError`
    with a line that says so and what to do.
    """

    # Whether a layer of a stack can be read without taking it out (`at_layer`).
    reads_layers: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for, axes for stacking included."""

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays in memory, wherever that is."""
        return sum(map(array_bytes, jax.tree.leaves(self)))

    @abstractmethod
    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """`einsum(equation, x, self)` in the dtype of `x`; see `weights.contract`."""

    @abstractmethod
    def rows(self, ids: jax.Array) -> jax.Array:
        """Entries along the first axis, `[*ids.shape, *shape[1:]]`; see `weights.gather`."""

    @abstractmethod
    def take(self, axis: int, index: Index) -> "Weight":
        """A copy of some entries along an axis.

        Args:
          axis: Of `shape`, counted from the end.

        Raises:
          ValueError: The format has no boundary there.
        """

    def at_layer(self, index: jax.Array) -> "StandIn":
        """One layer of a stack, whose axis is the first of all arrays, where the stack lies.

        Raises:
          ValueError: The format reads no layers so.
        """
        raise ValueError(f"{type(self).__name__} does not read a layer of a stack where it lies")

    @abstractmethod
    def dense(self) -> jax.Array:
        """The array that this stands for, in the dtype that it is computed in."""

    @abstractmethod
    def array_dims(self, dims: str) -> Any:
        """The letters of each array, by which meshes split it.

        Args:
          dims: Letters of the last axes of `shape`.

        Returns:
          This pytree with the letters of an array's last axes in the place of each array, `_` for
          an axis that is never split. Where a letter's axis holds blocks, whole blocks are split.
        """

    def head_rows(self) -> jax.Array | QuantizedMatrix:
        """The same for a loss over its rows, `[V, D]`, which widens some of them at a time."""
        return self.dense()


Weight = jax.Array | StandIn


def entry_bits(dtype: Any) -> int:
    """Bits of an entry of an array in memory: two of 4 bits share a byte."""
    return 4 if dtype in (jnp.int4, jnp.uint4) else 8 * dtype.itemsize


def array_bytes(array: Any, shape: tuple[int, ...] | None = None) -> int:
    """Bytes of an array in memory.

    Args:
      array: Or whatever has its shape and dtype.
      shape: Of a part of it; default: all.
    """
    return -(-math.prod(array.shape if shape is None else shape) * entry_bits(array.dtype) // 8)


def array_dims(weight: Weight, dims: str) -> Any:
    """Letters in the place of each array of a weight; see `StandIn.array_dims`."""
    return weight.array_dims(dims) if isinstance(weight, StandIn) else dims


def dense(weight: Weight) -> jax.Array:
    """The weight as one array."""
    return weight.dense() if isinstance(weight, StandIn) else weight


def head_rows(weight: Weight) -> jax.Array | QuantizedMatrix:
    """The weight as `gemma_kernels.cross_entropy` takes a table; see `StandIn.head_rows`."""
    return weight.head_rows() if isinstance(weight, StandIn) else weight


@overload
def take(weight: jax.Array, axis: int, index: Index) -> jax.Array: ...
@overload
def take(weight: StandIn, axis: int, index: Index) -> Weight: ...
def take(weight: Weight, axis: int, index: Index) -> Weight:
    """Some entries of a weight along an axis, in memory of their own.

    Args:
      axis: Counted from the end; of an array, from either end.
      index: So many first entries, or the entries with these indices.
    """
    if isinstance(weight, StandIn):
        return weight.take(axis, index)
    if isinstance(index, int):
        return jax.lax.slice_in_dim(weight, 0, index, axis=axis)
    runs = [[i, i] for i in index[:1]]
    for i in index[1:]:
        if i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    pieces = [jax.lax.slice_in_dim(weight, first, last + 1, axis=axis) for first, last in runs]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)
