"""A part of a weight that stays where it is."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.weights.contract import contract, contracted
from gemma_jax.weights.off_device import DiskTable, HostTable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """Some entries of a weight along one axis, taken inside the programs that use them.

    Attributes:
      whole: An array, or an object in the place of one (see `quant.py`).
      axis: Counted from the end, so that axes for stacking may come and go in front.
      index: So many first entries, or the entries with these indices.
    """

    whole: Any
    axis: int = field(metadata={"static": True})
    index: int | tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, value: Any, axis: int, index: int | tuple[int, ...]) -> Any:
        """A part of `value`; of a part along the same axis, a part of the whole."""
        if isinstance(value, Part) and value.axis == axis:
            if not isinstance(value.index, int):
                index = value.index[:index] if isinstance(index, int) else _at(value.index, index)
            value = value.whole
        return cls(value, axis, index)

    def taken(self) -> Any:
        """The entries, in memory of their own."""
        if isinstance(self.whole, HostTable | DiskTable):
            raise ValueError(
                "a table off the device can be viewed, not cut; load the model with "
                'per_layer_table="device" to slice it'
            )
        axis = self.axis + jax.tree.leaves(self.whole)[0].ndim

        def take(a: jax.Array) -> jax.Array:
            # The scale of a stored weight has its first axes alone, those of the outputs.
            return _take(a, axis, self.index) if axis < a.ndim else a

        return jax.tree.map(take, self.whole)

    def __getitem__(self, rows: Any) -> jax.Array:
        """Rows along the first axis; the part is taken along another one."""
        return _take(self.whole[rows], self.axis, self.index)

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """`einsum(equation, x, self)`; see `nn.einsum.contract`."""
        letters_x, letters_w, result = equation.replace("->", ",").split(",")
        letter, inputs = letters_w[self.axis], contracted(equation)
        row = math.prod(size for name, size in zip(letters_x, x.shape) if name in inputs)
        if not isinstance(self.index, int) and letter in result and x.size == row:
            # With a single row of activations, extra results cost less than copied weights.
            return _take(contract(equation, x, self.whole), result.index(letter), self.index)
        # Ties the weights to this step's activations: XLA would otherwise cut them once, outside
        # the token loop, and keep the copies.
        whole, x = jax.lax.optimization_barrier((self.whole, x))
        return contract(equation, x, replace(self, whole=whole).taken())


def _at(index: tuple[int, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(index[i] for i in places)


def _take(a: jax.Array, axis: int, index: int | tuple[int, ...]) -> jax.Array:
    if isinstance(index, int):
        return jax.lax.slice_in_dim(a, 0, index, axis=axis)
    runs = [[i, i] for i in index[:1]]
    for i in index[1:]:
        if i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    pieces = [jax.lax.slice_in_dim(a, first, last + 1, axis=axis) for first, last in runs]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)
