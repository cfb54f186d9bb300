"""Streams a checkpoint into a model, piece by piece, each straight to its device and dtype.

Threads read, decode and check pieces, and write them into the parameters. Host memory holds one
piece per thread and nothing else, so the peak is the model plus less than its largest tensor. On a
mesh, a process reads what its own devices hold.
"""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.decoder.model import Block, Gemma, MakeBlock, abstract_model
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.runtime import Runtime
from gemma_jax.weights.off_device import DiskTable, Place
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.tree import ParamPath, dims_of, flat_params, with_params

from .beside_config import check_block
from .buffers import Box, Buffer, TableBuffer, local_boxes, make_buffer
from .changed_config import ChangeConfig, changed_config
from .errors import CheckpointError
from .matching import Move, match
from .params import named_slots
from .select_parts import config_for
from .source import Source

PIECE = 1 << 20  # bytes of a decoded piece: small enough to stay in cache
AHEAD = 8  # pieces waiting per thread
TABLE: ParamPath = ("per_layer", "table")

Placement = Callable[[ParamPath, str, tuple[int, ...]], jax.sharding.Sharding | None]
Transform = Callable[[nnx.Param, jax.Array], Weight]
Item, Result = TypeVar("Item"), TypeVar("Result")


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

    @property
    def path(self) -> ParamPath:
        return self.move.slot.path


def load_source(
    source: Source,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    modalities: Collection[str] | None = None,
    layout: Layout = "scan",
    runtime: Runtime = Runtime(),
    placement: Placement | None = None,
    transform: Transform | None = None,
    per_layer_table: Place = "device",
    per_layer_dtype: jax.typing.DTypeLike | None = None,
    config: ChangeConfig | None = None,
    block: MakeBlock = Block,
    progress: Callable[[int, int], None] | None = None,
) -> Gemma:
    """Loads the model of a source that is open; the arguments are those of `load_weights`.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.load_source(gc.open_source("checkpoints/digits"), dtype="float32").embed.table.dtype
      dtype('float32')
    """
    declared = config_for(source, modalities)
    check_block(source, declared, block)
    cfg = declared if config is None else changed_config(source, declared, config, block)
    model = abstract_model(cfg, runtime=runtime, layout=layout, block=block)
    params = flat_params(model)
    moves = match(source, named_slots(model))
    arrays, non_finite = {}, Counter()
    if per_layer_table != "device" and cfg.per_layer is None:
        raise ValueError(
            f"{per_layer_table=}, but this model has no per-layer table; leave it at 'device'"
        )
    if per_layer_table == "disk":
        (move,) = (move for move in moves if move.slot.path == TABLE)
        moves.remove(move)
        arrays[TABLE] = _on_disk(source, move, per_layer_dtype or dtype)

    def sharding(path: ParamPath) -> jax.sharding.Sharding | None:
        if placement is None or (path == TABLE and per_layer_table == "host"):
            return None
        return placement(path, dims_of(params[path]), params[path].get_value().shape)

    def buffer(path: ParamPath, stored: np.dtype) -> Buffer:
        shape = params[path].get_value().shape
        if path == TABLE and per_layer_table == "host":
            return TableBuffer(shape, jnp.dtype(per_layer_dtype or dtype or stored))
        return make_buffer(shape, jnp.dtype(dtype or stored), sharding(path))

    def boxes(move: Move) -> list[Box]:
        slot = move.slot
        parts = local_boxes(params[slot.path].get_value().shape, sharding(slot.path))
        return list(dict.fromkeys(box if slot.row is None else box[1:] for box in parts))

    total, done = sum(_size(move, *_region(move, box)) for move in moves for box in boxes(move)), 0
    pieces = _pieces(moves, boxes, buffer, by_rows=source.reads_rows)

    def work(piece: Piece) -> int:
        array = _decode(source, piece)
        piece.buffer.write(*_located(array, piece))
        return count_non_finite(array)

    for piece, bad in _in_threads(work, pieces):
        non_finite[piece.move.row.theirs] += bad
        if piece.last:
            array = piece.buffer.finish()
            if transform is not None and not isinstance(piece.buffer, TableBuffer):
                array = transform(params[piece.path], array)
            arrays[piece.path] = array
        done += _size(piece.move, piece.rows, piece.columns)
        if progress is not None:
            progress(done, total)
    if broken := +non_finite:  # those above zero
        problems = [f"{name}: {n} values are NaN or infinite" for name, n in broken.items()]
        raise CheckpointError(source.path, problems)
    return with_params(model, arrays)


def _on_disk(source: Source, move: Move, dtype: jax.typing.DTypeLike | None) -> DiskTable:
    """The table of per-layer embeddings, left in its file."""
    if not hasattr(source, "mapped"):
        raise CheckpointError(
            source.path,
            f"the per-layer table of a {source.format} checkpoint cannot stay on disk; save it as "
            "a Hugging Face folder first",
        )
    mapped = source.mapped(move.row.theirs)
    return DiskTable.of(mapped, move.slot.shape[1:], jnp.dtype(dtype or mapped.dtype))


def _pieces(
    moves: list[Move],
    boxes: Callable[[Move], list[Box]],
    make: Callable[[ParamPath, np.dtype], Buffer],
    *,
    by_rows: bool,
) -> Iterator[Piece]:
    """Param by Param; its buffer is made when the first piece is asked for."""
    groups: dict[ParamPath, list[Move]] = {}
    for move in moves:
        groups.setdefault(move.slot.path, []).append(move)
    for path, group in groups.items():
        buffer = make(path, jnp.result_type(*(move.info.dtype for move in group)))
        parts = [
            (move, part)
            for move in group
            for box in boxes(move)
            for part in (_cut(move, box) if by_rows else [box])
        ]
        for i, (move, box) in enumerate(parts, 1):
            yield Piece(move, box, *_region(move, box), buffer, last=i == len(parts))


def _cut(move: Move, box: Box) -> list[Box]:
    """Boxes of about `PIECE` bytes where rows of theirs are rows of ours, else the one."""
    parsed = move.row.parsed
    if parsed is not None and not (parsed.keeps_first_axis and len(parsed.left[0]) == 1):
        return [box]
    first, *rest = box
    step = max(1, PIECE * len(first) // max(1, _size(move, *_region(move, box))))
    return [(first[i : i + step], *rest) for i in range(0, len(first), step)]


def _region(move: Move, box: Box) -> tuple[slice, slice]:
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


def _size(move: Move, rows: slice, columns: slice) -> int:
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


def _in_threads(
    work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """`(item, work(item))` in order; a bounded number of items is begun ahead of the consumer."""
    threads = min(8, os.cpu_count() or 1)
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > AHEAD * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


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
