"""Pieces of plain tensors on their way into the model: what part of which tensor goes where."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gemma_jax.weights.tree import ParamPath

from .buffers import Box, Buffer
from .matching import Move
from .source import Source

PIECE = 1 << 20  # bytes of a decoded piece: small enough to stay in cache


@dataclass(frozen=True)
class Piece:
    """Part of one tensor, on its way into the buffer of a Param.

    Attributes:
      box: Of our parameter, as `move.slot` describes it.
      rows, columns: Of their tensor, the same part.
      last: Whether no piece of the Param comes after.
    """

    move: Move
    box: Box
    rows: slice
    columns: slice
    buffer: Buffer
    last: bool

    what = "values"  # that may be broken

    @property
    def path(self) -> ParamPath:
        return self.move.slot.path

    @property
    def nbytes(self) -> int:
        return size(self.move, self.rows, self.columns)

    def fill(self, source: Source) -> int:
        """Reads, decodes and writes; how many values are NaN or infinite."""
        array = _decode(source, self)
        self.buffer.write(*_located(array, self))
        return count_non_finite(array)


def pieces_of(
    group: list[Move], boxes: Callable[[Move], list[Box]], buffer: Buffer, *, by_rows: bool
) -> Iterator[Piece]:
    """The pieces of one Param."""
    parts = [
        (move, part)
        for move in group
        for box in boxes(move)
        for part in (_cut(move, box) if by_rows else [box])
    ]
    for i, (move, box) in enumerate(parts, 1):
        yield Piece(move, box, *region(move, box), buffer, last=i == len(parts))


def _cut(move: Move, box: Box) -> list[Box]:
    """Boxes of about `PIECE` bytes where rows of theirs are rows of ours, else the one."""
    parsed = move.row.parsed
    if parsed is not None and not (parsed.keeps_first_axis and len(parsed.left[0]) == 1):
        return [box]
    first, *rest = box
    step = max(1, PIECE * len(first) // max(1, size(move, *region(move, box))))
    return [(first[i : i + step], *rest) for i in range(0, len(first), step)]


def region(move: Move, box: Box) -> tuple[slice, slice]:
    """Rows and columns of their tensor that hold a box of our parameter.

    Raises:
      ValueError: Other axes than those are split.
    """
    slot, parsed = move.slot, move.row.parsed
    sizes, cuts = slot.sizes, dict(zip(slot.dims, box))
    axes = tuple(slot.dims) if parsed is None else parsed.left
    regions = []
    for letters in axes:  # none for an axis of size 1
        cut = cuts[letters[0]] if letters else range(1)
        inner = math.prod(sizes[letter] for letter in letters[1:])
        regions.append(slice(cut.start * inner, cut.stop * inner))
    leading = {letters[0] for letters in axes[:2] if letters}
    for letter, cut in cuts.items():
        if letter not in leading and cut != range(sizes[letter]):
            raise ValueError(
                f"{move.name} cannot be loaded in parts along {letter}; drop the rule for it"
            )
    return regions[0], regions[1] if len(regions) > 1 else slice(None)


def size(move: Move, rows: slice, columns: slice) -> int:
    """Bytes of part of a tensor after decoding."""
    shape = list(move.info.shape)
    shape[:2] = [len(range(n)[cut]) for n, cut in zip(shape, (rows, columns))]
    return math.prod(shape) * move.info.dtype.itemsize


def _decode(source: Source, piece: Piece) -> np.ndarray:
    """The piece as our parameter has it, still in the dtype of the source."""
    row, slot = piece.move.row, piece.move.slot
    array = source.read(row.theirs, piece.rows, piece.columns)
    if row.plus_one:
        array = array - array.dtype.type(1)
    if row.parsed is None:
        return array
    return row.parsed(array, dict(zip(slot.dims, map(len, piece.box))))


def _located(array: np.ndarray, piece: Piece) -> tuple[np.ndarray, tuple[int, ...]]:
    """`array` with the axes of the Param, and the index of its first element in it."""
    row, index = piece.move.slot.row, tuple(cut.start for cut in piece.box)
    return (array, index) if row is None else (array[None], (row, *index))


_EXPONENTS = {
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}


def count_non_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite, that is, have all exponent bits set.

    NumPy's own `isfinite` takes bfloat16 one value at a time.
    """
    unsigned, exponent = _EXPONENTS[array.dtype.name]
    return np.count_nonzero((array.view(unsigned) & unsigned(exponent)) == unsigned(exponent))
