"""A quantised matrix in the place of an array, as simple as can be: for tests of loading."""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from gemma_jax.weights.contract import contracted
from gemma_jax.weights.protocol import StandIn
from gemma_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept(StandIn):
    matrix: QuantizedMatrix
    row_shapes: tuple[int, ...] = field(metadata={"static": True})  # without axes of layers

    @property
    def shape(self):
        return (*self.matrix.shape[:-2], *self.row_shapes)

    def contract(self, equation, x):
        inputs = len(contracted(equation))
        rows_RI = x.reshape(-1, self.matrix.shape[-1])
        y_RO = quantized_matmul(rows_RI, self.matrix)
        return y_RO.reshape(*x.shape[: x.ndim - inputs], *self.row_shapes[:-inputs])

    def rows(self, ids):
        return self.matrix.rows(ids).reshape(*ids.shape, *self.row_shapes[1:])

    def dense(self):
        return self.matrix.dense().reshape(self.shape)

    def take(self, axis, index):
        raise NotImplementedError

    def array_dims(self, dims):
        raise NotImplementedError


def keep(param, matrix) -> Kept:
    """As `load_weights` takes it."""
    shape = param.get_value().shape
    stacked = matrix.codes.ndim - (5 if matrix.tiled else 2)
    assert math.prod(shape[stacked:]) == math.prod(matrix.shape[-2:])
    if matrix.table is not None:  # layers are stacked along the first axis of all arrays
        table = jnp.broadcast_to(matrix.table, (*shape[:stacked], 16))
        matrix = replace(matrix, table=table)
    return Kept(matrix, shape[stacked:])
