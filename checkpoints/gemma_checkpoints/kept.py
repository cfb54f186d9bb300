"""Quantised tensors that stay as they are: which ones can, and the pieces that they are read in."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from flax import nnx
from jax.sharding import Sharding

from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.tree import ParamPath, flat_params
from gemma_kernels.quantized_matmul import QuantizedMatrix
from gemma_kernels.quantized_matmul.form import ROWS

from .blocks import BlockForm
from .buffers import Shape
from .matching import Move, match
from .matrix_buffer import MatrixBuffer, matrix_sharding
from .params import named_slots
from .source import Source

PIECE = 1 << 19  # bytes of the file
Keep = Callable[[nnx.Param, QuantizedMatrix], Weight]
Region = tuple[slice, slice]  # rows and columns of a tensor


@runtime_checkable
class KeepsMatrices(Protocol):
    """A source of parameters that were quantised matrices before they were saved."""

    def matrix_of(self, group: Sequence[Move]) -> QuantizedMatrix | None:
        """That of a Param, whose layers are the tensors of `group`; `None` if it is no such."""
        ...


@dataclass(frozen=True)
class KeptPiece:
    """Some rows of one quantised tensor, on their way into the matrix of a Param.

    Attributes:
      rows, columns: Of the tensor, and of the matrix.
      nbytes: After decoding, as those of other pieces are counted.
      last: Whether no piece of the Param comes after.
    """

    move: Move
    rows: slice
    columns: slice
    nbytes: int
    buffer: MatrixBuffer
    last: bool

    what = "scales"  # that may be broken

    @property
    def path(self) -> ParamPath:
        return self.move.slot.path

    def fill(self, source: Source) -> int:
        """Reads and writes; how many scales are NaN or infinite."""
        blocks = source.read_blocks(self.move.row.theirs, self.rows).columns(self.columns)
        self.buffer.write(blocks, self.move.slot.row, self.rows.start, self.columns.start)
        return blocks.count_non_finite()


def is_quantised(move: Move) -> bool:
    """Whether reading makes other numbers of what is stored than the stored ones."""
    info = move.info
    return info.nbytes != math.prod(info.shape) * info.dtype.itemsize


def kept_buffer(group: list[Move], param: nnx.Param, sharding: Sharding | None) -> MatrixBuffer:
    """Memory for the matrix of one Param, whose layers are the tensors of `group`.

    Raises:
      ValueError: It has to be widened; says why.
    """
    form, shape, num_outputs = kept_form(group, param)
    rank, stacked = len(param.get_value().shape), len(shape) - 2
    return MatrixBuffer(form, shape, matrix_sharding(sharding, rank, stacked, num_outputs))


def kept_form(group: list[Move], param: nnx.Param) -> tuple[BlockForm, Shape, int]:
    """How one Param is kept: form, shape `[..., O, I]`, and how many of its axes make up O.

    Raises:
      ValueError: It has to be widened; says why.
    """
    first, *others = (move.info.form for move in group)
    if first is None or None in others:
        raise ValueError("no form in memory")
    if any(other != first for other in others):
        raise ValueError("layers of one stack are of different types")
    num_outputs = _output_axes(group[0])
    shape = param.get_value().shape
    stacked = len(shape) - len(group[0].slot.shape)
    return first, (*shape[:stacked], *group[0].info.shape), num_outputs


def kept_bytes(source: Source, model: Gemma, bits: int = 16) -> dict[ParamPath, int]:
    """Bytes of every parameter of a model, abstract or not, if quantised tensors stay as they are.

    Args:
      bits: Of an entry of all else: vectors, what is stored in floats, and what has to be widened.
    """
    params, groups, sizes = flat_params(model), {}, {}
    for move in match(source, named_slots(model)):
        groups.setdefault(move.slot.path, []).append(move)
    for path, group in groups.items():
        sizes[path] = math.prod(params[path].get_value().shape) * bits // 8
        if any(map(is_quantised, group)):
            with suppress(ValueError):
                form, shape, _ = kept_form(group, params[path])
                sizes[path] = form.nbytes(shape)
    return sizes


def kept_pieces(
    group: list[Move], buffer: MatrixBuffer, regions: Callable[[Move], Iterable[Region]]
) -> Iterator[KeptPiece]:
    """The pieces of one Param, in the order of the file's rows, a multiple of 8 rows each."""
    pieces = []
    for move in group:
        row_bytes = move.info.nbytes / move.info.shape[0]
        step = max(ROWS, int(PIECE / row_bytes) // ROWS * ROWS)
        for rows, columns in regions(move):
            rows, columns = (
                slice(*cut.indices(n)[:2]) for cut, n in zip((rows, columns), move.info.shape)
            )
            for start in range(rows.start, rows.stop, step):
                cut = slice(start, min(start + step, rows.stop))
                size = (cut.stop - cut.start) * (columns.stop - columns.start)
                nbytes = size * move.info.dtype.itemsize
                pieces.append(KeptPiece(move, cut, columns, nbytes, buffer, last=False))
    yield from pieces[:-1]
    yield replace(pieces[-1], last=True)


def _output_axes(move: Move) -> int:
    """How many axes of the parameter are the rows of the tensor, in their order."""
    parsed, shape = move.row.parsed, move.info.shape
    if len(shape) != 2 or move.row.plus_one:
        raise ValueError("no matrix")
    if parsed is None:
        return 1
    if "".join(parsed.left) != "".join(parsed.right):
        raise ValueError("rows or columns change their order")
    sizes = [math.prod(move.slot.shape[:i]) for i in range(len(move.slot.shape))]
    return sizes.index(shape[0])
