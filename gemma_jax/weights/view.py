"""A part of a weight that stays where it is."""

import math
from dataclasses import dataclass, field, replace

import jax

from gemma_jax.weights.contract import contract, contracted
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import (
    Index,
    StandIn,
    Weight,
    array_dims,
    dense,
    head_rows,
    take,
)
from gemma_kernels.quantized_matmul import QuantizedMatrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part(StandIn):
    """Some entries of a weight along one axis, taken inside the programs that use them.

    Attributes:
      whole: The weight.
      axis: Counted from the end, so that axes for stacking may come and go in front.
      index: So many first entries, or the entries with these indices.
    """

    whole: Weight
    axis: int = field(metadata={"static": True})
    index: Index = field(metadata={"static": True})

    @classmethod
    def of(cls, value: Weight, axis: int, index: Index) -> "Part":
        """A part of `value`; of a part along the same axis, a part of the whole."""
        if isinstance(value, Part) and value.axis == axis:
            if not isinstance(value.index, int):
                index = value.index[:index] if isinstance(index, int) else _at(value.index, index)
            value = value.whole
        return cls(value, axis, index)

    def taken(self) -> Weight:
        """The entries, in memory of their own."""
        return take(self.whole, self.axis, self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        shape = list(self.whole.shape)
        shape[self.axis] = self.index if isinstance(self.index, int) else len(self.index)
        return tuple(shape)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows along the first axis; the part is taken along another one."""
        return take(lookup(self.whole, ids), self.axis, self.index)

    def dense(self) -> jax.Array:
        """See `StandIn`."""
        return take(dense(self.whole), self.axis, self.index)

    def take(self, axis: int, index: Index) -> Weight:
        """See `StandIn`."""
        return take(self.taken(), axis, index)

    def array_dims(self, dims: str) -> "Part":
        """Those of the whole."""
        return replace(self, whole=array_dims(self.whole, dims))

    def head_rows(self) -> jax.Array | QuantizedMatrix:
        """See `StandIn`."""
        return head_rows(self.taken())

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """`einsum(equation, x, self)`; see `weights.contract`."""
        letters_x, letters_w, result = equation.replace("->", ",").split(",")
        letter, inputs = letters_w[self.axis], contracted(equation)
        row = math.prod(size for name, size in zip(letters_x, x.shape) if name in inputs)
        if not isinstance(self.index, int) and letter in result and x.size == row:
            # With a single row of activations, extra results cost less than copied weights.
            return take(contract(equation, x, self.whole), result.index(letter), self.index)
        # Ties the weights to this step's activations: XLA would otherwise cut them once, outside
        # the token loop, and keep the copies.
        whole, x = jax.lax.optimization_barrier((self.whole, x))
        return contract(equation, x, replace(self, whole=whole).taken())


def _at(index: tuple[int, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(index[i] for i in places)
