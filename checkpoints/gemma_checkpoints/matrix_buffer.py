"""Quantised matrices under construction: their arrays in final shape and place, filled by rows."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gemma_kernels.quantized_matmul import QuantizedMatrix
from gemma_kernels.quantized_matmul.form import COLUMNS, QUAD, ROWS

from .blocks import BlockForm, Blocks, row_tiles
from .buffers import Shape, make_buffer


class MatrixBuffer:
    """`write(blocks, ...)` from any thread, then `finish()` for the matrix.

    CPUs get tiles, where the matrix (on a mesh, the part of each device) is made of whole ones;
    other devices get rows.
    """

    def __init__(self, form: BlockForm, shape: Shape, sharding: Sharding | None = None):
        """Allocates the arrays.

        Args:
          shape: `[..., O, I]`, with one axis of layers in front or none.
          sharding: Of an array with these axes; see `matrix_sharding`.

        Raises:
          ValueError: The sharding splits groups.
        """
        *stack, O, I = shape
        tiled = (*stack, O // ROWS, I // COLUMNS), (*stack, O // ROWS, I // form.group)
        plain = tuple(shape), (*stack, O, I // form.group)
        whole = O % ROWS == I % COLUMNS == 0
        self.tiled = _platform(sharding) == "cpu" and whole and _can_split(tiled, sharding)
        if self.tiled:
            codes, factors = (*tiled[0], form.bits, ROWS, QUAD), (*tiled[1], ROWS)
        elif _can_split(plain, sharding):
            codes, factors = plain
        else:
            raise ValueError(f"the mesh splits groups of {form.group}")
        self._form = form
        self._codes = make_buffer(
            codes, form.tile_dtype if self.tiled else form.code_dtype, sharding
        )
        self._scale = make_buffer(factors, form.scale, sharding)
        self._offset = make_buffer(factors, form.scale, sharding) if form.has_offset else None

    def write(self, blocks: Blocks, layer: int | None, row: int, column: int) -> None:
        """Puts some rows where their first code has this place; of tiles, whole ones."""
        front = () if layer is None else (layer,)
        group = column // self._form.group
        if self.tiled:
            codes_at = (*front, row // ROWS, column // COLUMNS, 0, 0, 0)
            factors_at = (*front, row // ROWS, group, 0)
            codes, laid_out = blocks.tiles(), row_tiles
        else:
            codes_at, factors_at = (*front, row, column), (*front, row, group)
            codes, laid_out = blocks.rows(), lambda factors: factors
        in_stack = (None,) * len(front)  # as an index: an axis for each
        self._codes.write(codes[in_stack], codes_at)
        self._scale.write(laid_out(blocks.scale)[in_stack], factors_at)
        if self._offset is not None and blocks.offset is not None:
            self._offset.write(laid_out(blocks.offset)[in_stack], factors_at)

    def finish(self) -> QuantizedMatrix:
        """The matrix; its arrays are those that were filled."""
        codes, scale = self._codes.finish(), self._scale.finish()
        offset = None if self._offset is None else self._offset.finish()
        table = None if self._form.table is None else jnp.array(self._form.table, jnp.float32)
        return QuantizedMatrix(codes, scale, offset, table, self.tiled)  # pyright: ignore[reportArgumentType]


def matrix_sharding(
    sharding: Sharding | None, rank: int, stacked: int, num_outputs: int
) -> Sharding | None:
    """The sharding of a matrix `[..., O, I]`, from that of the parameter that it stands for.

    Args:
      rank: Axes of the parameter.
      stacked: Those of layers, in front.
      num_outputs: Those after them that make up O.

    Raises:
      ValueError: An axis is split that is neither the first of the outputs nor of the inputs.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (rank - len(sharding.spec)))
    inputs = stacked + num_outputs
    kept = (*spec[:stacked], spec[stacked], spec[inputs])
    if sum(one is not None for one in spec) > sum(one is not None for one in kept):
        raise ValueError("the mesh splits an axis within the rows or columns of the matrix")
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _platform(sharding: Sharding | None) -> str:
    if sharding is None:
        return jax.default_backend()
    return next(iter(sharding.device_set)).platform


def _can_split(shapes: tuple[Shape, ...], sharding: Sharding | None) -> bool:
    """Whether arrays of these shapes can be split so, into equal parts."""
    try:
        return sharding is None or all(sharding.shard_shape(shape) for shape in shapes)
    except ValueError:
        return False
