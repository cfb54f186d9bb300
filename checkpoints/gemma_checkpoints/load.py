"""Streams a checkpoint into a model, piece by piece, each straight to its device and dtype.

Threads read, decode and check pieces, and write them into the parameters. Host memory holds one
piece per thread and nothing else, so the peak is the model plus less than its largest tensor.
"""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.context import Runtime
from gemma_jax.model import Gemma
from gemma_jax.nn.off_device import DiskTable, Place
from gemma_jax.segments import Layout

from .buffers import Buffer, TableBuffer, make_buffer
from .errors import CheckpointError
from .match import Move, match
from .modalities import config_for
from .params import ParamPath, abstract_model, flat_params, named_slots
from .source import Source

PIECE = 1 << 20  # bytes of a decoded piece: small enough to stay in cache
AHEAD = 8  # pieces waiting per thread
TABLE: ParamPath = ("per_layer", "table")

Placement = Callable[[ParamPath, str, tuple[int, ...]], jax.sharding.Sharding | None]
Transform = Callable[[nnx.Param, jax.Array], Any]
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor, on their way into the buffer of a Param."""

    move: Move
    rows: slice
    buffer: Buffer
    last: bool  # of its Param

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
    progress: Callable[[int, int], None] | None = None,
) -> Gemma:
    """`load_model` for a source that is open; the arguments are documented there."""
    cfg = config_for(source, modalities)
    model = abstract_model(cfg, runtime=runtime, layout=layout)
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
    total, done = sum(_size(move) for move in moves), 0

    def buffer(path: ParamPath, stored: np.dtype) -> Buffer:
        param = params[path]
        shape = param.get_value().shape
        if path == TABLE and per_layer_table == "host":
            return TableBuffer(shape, jnp.dtype(per_layer_dtype or dtype or stored))
        sharding = None if placement is None else placement(path, param.dims, shape)
        return make_buffer(shape, jnp.dtype(dtype or stored), sharding)

    pieces = _pieces(moves, buffer, _cut if source.reads_rows else _whole)

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
        done += _size(piece.move, piece.rows)
        if progress is not None:
            progress(done, total)
    if broken := +non_finite:  # those above zero
        problems = [f"{name}: {n} values are NaN or infinite" for name, n in broken.items()]
        raise CheckpointError(source.path, problems)
    return _with_arrays(model, arrays)


def _on_disk(source: Source, move: Move, dtype: jax.typing.DTypeLike | None) -> DiskTable:
    """The table of per-layer embeddings, left in its file."""
    if not hasattr(source, "mapped"):
        raise CheckpointError(
            source.path,
            f"the per-layer table of a {source.format} checkpoint cannot stay on disk; convert it "
            "with `gemma-jax convert --to hf`",
        )
    mapped = source.mapped(move.row.theirs)
    return DiskTable.of(mapped, move.slot.shape[1:], jnp.dtype(dtype or mapped.dtype))


def _pieces(
    moves: list[Move],
    make: Callable[[ParamPath, np.dtype], Buffer],
    cut: Callable[[Move], list[slice]],
) -> Iterator[Piece]:
    """Param by Param; its buffer is made when the first piece is asked for."""
    groups: dict[ParamPath, list[Move]] = {}
    for move in moves:
        groups.setdefault(move.slot.path, []).append(move)
    for path, group in groups.items():
        buffer = make(path, jnp.result_type(*(move.info.dtype for move in group)))
        cuts = [(move, rows) for move in group for rows in cut(move)]
        for i, (move, rows) in enumerate(cuts, 1):
            yield Piece(move, rows, buffer, last=i == len(cuts))


def _cut(move: Move) -> list[slice]:
    """Pieces of about `PIECE` bytes where rows of theirs are rows of ours, else one piece."""
    count = move.info.shape[0]
    if move.row.parsed is not None and not move.row.parsed.keeps_first_axis:
        return _whole(move)
    step = max(1, PIECE * count // max(1, _size(move)))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def _whole(move: Move) -> list[slice]:
    return [slice(0, move.info.shape[0])]


def _size(move: Move, rows: slice | None = None) -> int:
    """Bytes of a tensor, or of some rows of it, after decoding."""
    first, *rest = move.info.shape
    count = first if rows is None else rows.stop - rows.start
    return count * math.prod(rest) * move.info.dtype.itemsize


def _decode(source: Source, piece: Piece) -> np.ndarray:
    """The piece as our parameter has it, still in the dtype of the source."""
    row, slot = piece.move.row, piece.move.slot
    array = source.read(row.theirs, piece.rows)
    if row.plus_one:
        array = array - array.dtype.type(1)
    if row.parsed is None:
        return array
    sizes = dict(slot.sizes)
    if row.parsed.keeps_first_axis and len(row.parsed.left[0]) == 1:
        sizes[row.parsed.left[0]] = len(array)
    return row.parsed(array, sizes)


def _located(array: np.ndarray, piece: Piece) -> tuple[np.ndarray, tuple[int, ...]]:
    """`array` with the axes of the Param, and the index of its first element in it."""
    row, start = piece.move.slot.row, piece.rows.start
    index = (start, *[0] * (array.ndim - 1))
    return (array, index) if row is None else (array[None], (row, *index))


def _in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
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


def _with_arrays(model: Gemma, arrays: dict[ParamPath, Any]) -> Gemma:
    graph, state = nnx.split(model)
    flat = {path: param.replace(arrays[path]) for path, param in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))
