"""Weights as codes of 4 or 8 bits with a scale for every few inputs.

The form is that of `gemma_kernels.quantized_matmul`: what a file holds in blocks of 32, and what
rounding makes of floats. On a CPU it lies in tiles of 8 rows and 32 columns, where these divide it;
on a TPU in columns, unless rows are looked up; elsewhere, and for small matrices, in rows.

Local letters: R rows; O outputs; I inputs of one product.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.sharding import Partition
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.on_mesh import product_on_mesh
from gemma_jax.weights.protocol import Index, StandIn, take
from gemma_jax.weights.rounding import round_to_groups
from gemma_kernels.platform import target_platform
from gemma_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul
from gemma_kernels.quantized_matmul.dispatch import Activations
from gemma_kernels.quantized_matmul.form import COLUMNS, ROWS

PIECE_BYTES = 4 << 20  # of floats that are rounded at one time
LANES = 128  # of a TPU: sides of matrices in columns are multiples of it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight(StandIn):
    """A weight with output letters first, as a quantised matrix.

    Attributes:
      matrix: `[..., *outputs, I]`: its last axis is all inputs; in columns `[..., O, I]`. A table
        of values has the axes for stacking in front, as all arrays do.
      inputs: Sizes of the input axes, whose product is I.
      activations: What activations are rounded to before the product; see `quantized_matmul`.
      outputs: Sizes of the output axes, where they are one axis of the matrix: in columns.
      layer: int32. The arrays are stacks with one axis more in front, of which this one is meant.
      partition: The mesh that the arrays are spread over: each device multiplies with its part, as
        the compiler cannot cut kernels.
    """

    matrix: QuantizedMatrix
    inputs: tuple[int, ...] = field(metadata={"static": True})
    activations: Activations = field(default="float", metadata={"static": True})
    outputs: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    partition: Partition | None = field(default=None, metadata={"static": True})
    layer: jax.Array | None = None

    reads_layers = True

    @classmethod
    def of(
        cls,
        matrix: QuantizedMatrix,
        shape: tuple[int, ...],
        num_inputs: int,
        activations: Activations = "float",
        *,
        num_stacked: int = 0,
    ) -> "QuantizedWeight":
        """A weight of this shape out of a matrix with the same entries in order, `[..., O, I]`.

        In tiles or rows, as the matrix; tiles across rows of the last output axis become rows.

        Args:
          num_inputs: Axes that the product sums over, the last ones of `shape`.
          num_stacked: Axes for stacking, the first ones of `shape`.
        """
        outputs, inputs = shape[:-num_inputs], shape[-num_inputs:]
        if matrix.tiled and outputs[-1] % ROWS:
            matrix = matrix.to_rows()
        heads = (*outputs[:-1], outputs[-1] // ROWS) if matrix.tiled else outputs
        front = len(matrix.shape) - 1
        arrays = {
            name: None if array is None else array.reshape(*heads, *array.shape[front:])
            for name, array in _by_name(matrix).items()
        }
        table = matrix.table
        if table is not None and table.ndim == 1:
            table = jnp.broadcast_to(table, (*shape[:num_stacked], *table.shape))
        return cls(replace(matrix, **arrays, table=table), inputs, activations)

    @classmethod
    def rounded(
        cls,
        array: jax.Array,
        num_inputs: int,
        bits: int,
        group: int | None,
        activations: Activations = "float",
        *,
        in_pieces: bool = True,
        looked_up: bool = True,
        num_stacked: int = 0,
    ) -> "QuantizedWeight":
        """A weight of floats, rounded; see `round_to_groups`.

        Args:
          num_inputs: Axes that the product sums over, the last ones of `array`.
          group: Neighbouring inputs with one scale; `None`: all.
          in_pieces: Round some rows at a time, so that nothing but the result takes memory. Not for
            arrays that are spread over devices.
          looked_up, num_stacked: See `laid_out`.
        """
        outputs, inputs = array.shape[:-num_inputs], array.shape[-num_inputs:]
        total, I = math.prod(outputs), math.prod(inputs)
        tiled = target_platform() == "cpu" and is_of_tiles(outputs[-1], I)

        def round_rows(w_OI: jax.Array) -> QuantizedMatrix:
            matrix = QuantizedMatrix(*round_to_groups(w_OI, bits, group or I))
            return matrix.to_tiles() if tiled else matrix

        at_once = math.gcd(total, 1 << (PIECE_BYTES // (4 * I)).bit_length())
        if not in_pieces or at_once % ROWS or at_once == total:
            matrix = round_rows(array.reshape(*outputs, I))
        else:
            pieces = jax.lax.map(round_rows, array.reshape(-1, at_once, I))
            matrix = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), pieces)
        weight = cls.of(matrix, array.shape, num_inputs, activations)
        return weight.laid_out(looked_up=looked_up, num_stacked=num_stacked)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        shape = self.matrix.shape[:-1]
        if self.outputs is not None:
            shape = (*shape[:-1], *self.outputs)
        return (*shape[self.layer is not None :], *self.inputs)

    def laid_out(self, *, looked_up: bool = True, num_stacked: int = 0) -> "QuantizedWeight":
        """In the layout of this platform; see the top of this file.

        Args:
          looked_up: Whether rows are read as well: those of a matrix in columns are spread.
          num_stacked: Axes for stacking, in front.
        """
        platform = target_platform()
        if platform == "cpu" and self.matrix.tiled:
            return self  # first of all: what a file holds is not laid out twice
        rows = self.in_rows()
        *_, last, I = rows.matrix.shape
        if platform == "cpu" and is_of_tiles(last, I):
            return replace(rows, matrix=rows.matrix.to_tiles())
        outputs = rows.matrix.shape[num_stacked:-1]
        if platform == "tpu" and not (looked_up or I % LANES or math.prod(outputs) % LANES):
            flat = rows._map(lambda a: a.reshape(*a.shape[:num_stacked], -1, a.shape[-1]))
            return replace(rows, matrix=flat.to_columns(), outputs=outputs)
        return rows

    def in_rows(self) -> "QuantizedWeight":
        """The same with the codes of each row next to each other."""
        rows = replace(self, matrix=self.matrix.to_rows(), outputs=None)
        if (outputs := self.outputs) is None:
            return rows
        apart = rows._map(lambda a: a.reshape(*a.shape[:-2], *outputs, a.shape[-1]))
        return replace(rows, matrix=apart)

    def at_layer(self, index: jax.Array) -> "QuantizedWeight":
        """See `StandIn`; kernels read it where it lies."""
        if self.matrix.table is None:
            return replace(self, layer=index)
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, False), self)

    def _alone(self) -> "QuantizedWeight":
        """The layer that is meant, taken out of its stack."""
        if self.layer is None:
            return self
        return replace(self, matrix=self.matrix.layer(self.layer), layer=None)

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """`einsum(equation, x, self)`, summed in float32, returned in the dtype of `x`."""
        if self.partition is not None:
            return product_on_mesh(equation, x, self, self.partition)
        free, outputs = x.ndim - len(self.inputs), self.shape[: -len(self.inputs)]
        rows_RI, flat = x.reshape(math.prod(x.shape[:free]), -1), self.matrix
        if self.outputs is None:
            front = self.layer is not None
            behind = front + len(outputs)
            flat = self._map(lambda a: a.reshape(*a.shape[:front], -1, *a.shape[behind:]))
        if target_platform() != "tpu":
            # Ties the weights to this step's activations: XLA would otherwise widen them once,
            # outside the token loop, and keep the float32 copy. For TPUs it does not, but would
            # write a layer's weights out before it multiplies what is tied.
            flat, rows_RI = jax.lax.optimization_barrier((flat, rows_RI))
        y_RO = quantized_matmul(
            rows_RI, flat, activations=self.activations, layer=self.layer, frozen=True
        )
        return y_RO.reshape(*x.shape[:free], -1, *outputs[1:])

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows along the first axis, widened to float32."""
        if self.layer is not None or self.outputs is not None:
            return self._alone().in_rows().rows(ids)
        if self.matrix.tiled and len(self.matrix.shape) == 2:  # a tile has several of them
            wide = self.matrix.rows(ids)
        else:
            wide = self._map(lambda a: lookup(a, ids)).dense()
        return wide.reshape(*ids.shape, *self.shape[1:])

    def dense(self) -> jax.Array:
        """The array, widened to float32."""
        if self.layer is not None:
            return self._alone().dense()
        widen = QuantizedMatrix.dense
        for _ in range(0 if self.matrix.table is None else self.matrix.table.ndim - 1):
            widen = jax.vmap(widen)
        return widen(self.matrix).reshape(self.shape)

    def head_rows(self) -> QuantizedMatrix:
        """See `StandIn`."""
        return self._alone().matrix

    def take(self, axis: int, index: Index) -> "QuantizedWeight":
        """See `StandIn`; along inputs in whole groups. What is cut through tiles lies in rows."""
        if self.layer is not None:
            return self._alone().take(axis, index)
        count = len(self.inputs)
        if axis >= -count:
            taken = self._of_inputs(axis, index)
        else:
            taken = self._of_outputs(axis + count, index)
        if taken is None:  # through tiles
            taken = self.in_rows().take(axis, index)
            if is_of_tiles(*taken.matrix.shape[-2:]):
                taken = replace(taken, matrix=taken.matrix.to_tiles())
        return taken

    def _of_outputs(self, axis: int, index: Index) -> "QuantizedWeight | None":
        """Along an output axis, counted from the last one; `None` where it would go through tiles.

        The axes of groups and of what is inside a tile come after it.
        """
        if (sizes := self.outputs) is not None:
            columns, sizes = _places(sizes, axis, index)
            taken = self._with(lambda name, a: take(a, -1, columns))
            return replace(taken, outputs=sizes)
        if self.matrix.tiled and axis == -1:
            index = _in_units(index, ROWS)
            if index is None:
                return None
        behind = {"codes": 4 if self.matrix.tiled else 1, "scale": 2 if self.matrix.tiled else 1}
        behind["offset"] = behind["scale"]
        return self._with(lambda name, a: take(a, axis - behind[name], index))

    def _of_inputs(self, axis: int, index: Index) -> "QuantizedWeight | None":
        """Along an input axis; `None` where it would go through tiles."""
        columns, inputs = _places(self.inputs, axis, index)
        groups = _in_units(columns, group := self.matrix.group)
        one_scale = group == math.prod(self.inputs)
        if groups is None and not one_scale:
            raise ValueError(
                f"the cut goes through a group of {group} inputs that share a scale; use multiples "
                f"of {group}, or weights with a scale per channel"
            )
        tiles = _in_units(columns, COLUMNS) if self.matrix.tiled else columns
        if tiles is None:
            return None
        of_codes, of_groups = (-4, -2) if self.matrix.tiled else (-1, -1)
        if self.matrix.columns:
            of_codes, of_groups = -2, -2

        def cut(name: str, a: jax.Array) -> jax.Array:
            if name == "codes":
                return take(a, of_codes, tiles)
            return a if one_scale else take(a, of_groups, groups)

        return replace(self._with(cut), inputs=inputs)

    def array_dims(self, dims: str) -> "QuantizedWeight":
        """See `StandIn`; all inputs are one axis, which goes by the first of their letters."""
        outputs, letter = dims[: -len(self.inputs)], dims[-len(self.inputs)]
        groups = "_" if self.matrix.group == self.matrix.shape[-1] else letter
        inside = {"codes": "___", "scale": "_", "offset": "_"} if self.matrix.tiled else {}

        def letters(name: str, a: jax.Array) -> str:
            of_inputs = letter if name == "codes" else groups
            if self.matrix.columns:  # outputs, too, are one axis
                return of_inputs + outputs[0]
            return outputs + of_inputs + inside.get(name, "")

        named = self._with(letters)
        table = None if self.matrix.table is None else "_"
        layer = None if self.layer is None else ""
        return replace(named, matrix=replace(named.matrix, table=table), layer=layer)

    def _with(self, change) -> "QuantizedWeight":
        """The weight with `change(name, array)` in the place of codes, scales and offsets."""
        arrays = {
            name: None if array is None else change(name, array)
            for name, array in _by_name(self.matrix).items()
        }
        return replace(self, matrix=replace(self.matrix, **arrays))

    def _map(self, change) -> QuantizedMatrix:
        return self._with(lambda name, a: change(a)).matrix


def is_of_tiles(rows: int, columns: int) -> bool:
    """Whether a matrix is made of whole tiles."""
    return rows % ROWS == 0 and columns % COLUMNS == 0


def _by_name(matrix: QuantizedMatrix) -> dict[str, jax.Array | None]:
    return {"codes": matrix.codes, "scale": matrix.scale, "offset": matrix.offset}


def _places(
    sizes: tuple[int, ...], axis: int, index: Index
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places in the flat order of some axes, of the entries along one of them; and their sizes."""
    places = np.arange(math.prod(sizes)).reshape(sizes)
    chosen = np.take(places, range(index) if isinstance(index, int) else list(index), axis)
    return tuple(chosen.ravel().tolist()), chosen.shape


def _in_units(index: Index, unit: int) -> Index | None:
    """The same entries by whole units of neighbours, or `None` if they are not."""
    if isinstance(index, int):
        return None if index % unit else index // unit
    firsts = index[::unit]
    whole = [first + i for first in firsts for i in range(unit)]
    if list(index) != whole or any(first % unit for first in firsts):
        return None
    return tuple(first // unit for first in firsts)
