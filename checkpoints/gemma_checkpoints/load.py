"""Streams a checkpoint into a model, piece by piece, each straight to its device and dtype.

Threads read, decode and check pieces, and write them into the parameters. Host memory holds one
piece per thread and nothing else, so the peak is the model plus less than its largest tensor. On a
mesh, a process reads what its own devices hold. Quantised tensors may stay as they are (`kept.py`).
"""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from .catalog import Notify, to_stderr
from .changed_config import ChangeConfig, changed_config
from .errors import CheckpointError
from .kept import Keep, KeepsMatrices, KeptPiece, is_quantised, kept_buffer, kept_pieces
from .matching import Move, match
from .matrix_buffer import MatrixBuffer
from .params import named_slots
from .select_parts import config_for
from .source import Source

PIECE = 1 << 20  # bytes of a decoded piece: small enough to stay in cache
AHEAD = 8  # pieces waiting per thread
TABLE: ParamPath = ("per_layer", "table")

Placement = Callable[[ParamPath, str, tuple[int, ...]], jax.sharding.Sharding | None]
Transformed = Callable[[ParamPath, jax.Array], Weight]
Transform = Callable[[Gemma], Transformed]
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

    what = "values"  # that may be broken

    @property
    def path(self) -> ParamPath:
        return self.move.slot.path

    @property
    def nbytes(self) -> int:
        return _size(self.move, self.rows, self.columns)

    def fill(self, source: Source) -> int:
        """Reads, decodes and writes; how many values are NaN or infinite."""
        array = _decode(source, self)
        self.buffer.write(*_located(array, self))
        return count_non_finite(array)


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
    keep: Keep | None = None,
    notify: Notify | None = None,
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
    transformed = None if transform is None else transform(model)
    moves = match(source, named_slots(model))
    arrays, non_finite, widened = {}, Counter(), Counter()
    if per_layer_table != "device" and cfg.per_layer is None:
        raise ValueError(
            f"{per_layer_table=}, but this model has no per-layer table; leave it at 'device'"
        )
    if per_layer_table == "disk":
        (move,) = (move for move in moves if move.slot.path == TABLE)
        moves.remove(move)
        arrays[TABLE] = _on_disk(source, move, per_layer_dtype or dtype)

    def on_host(path: ParamPath) -> bool:
        return path == TABLE and per_layer_table == "host"

    def sharding(path: ParamPath) -> jax.sharding.Sharding | None:
        if placement is None or on_host(path):
            return None
        return placement(path, dims_of(params[path]), params[path].get_value().shape)

    def buffer(path: ParamPath, group: list[Move]) -> Buffer:
        stored = jnp.result_type(*(move.info.dtype for move in group))
        shape = params[path].get_value().shape
        if on_host(path):
            return TableBuffer(shape, jnp.dtype(per_layer_dtype or dtype or stored))
        return make_buffer(shape, jnp.dtype(dtype or stored), sharding(path))

    def boxes(move: Move) -> list[Box]:
        slot = move.slot
        parts = local_boxes(params[slot.path].get_value().shape, sharding(slot.path))
        return list(dict.fromkeys(box if slot.row is None else box[1:] for box in parts))

    def kept(path: ParamPath, group: list[Move]) -> MatrixBuffer | None:
        if keep is None or not any(map(is_quantised, group)):
            return None
        try:
            if on_host(path):
                raise ValueError("a table in the memory of the host")
            return kept_buffer(group, params[path], sharding(path))
        except ValueError as reason:
            widened.update((move.info.encoding, str(reason)) for move in group)
            return None

    groups: dict[ParamPath, list[Move]] = {}
    for move in moves:
        groups.setdefault(move.slot.path, []).append(move)
    if keep is not None and isinstance(source, KeepsMatrices):
        for path in [path for path in groups if not on_host(path)]:
            if (matrix := source.matrix_of(groups[path])) is not None:
                arrays[path] = keep(params[path], matrix)
                del groups[path]
    moves = [move for group in groups.values() for move in group]

    def pieces() -> Iterator[Piece | KeptPiece]:
        for path, group in groups.items():
            if (matrix := kept(path, group)) is not None:
                regions = lambda move: [_region(move, box) for box in boxes(move)]  # noqa: E731
                yield from kept_pieces(group, matrix, regions)
            else:
                yield from _pieces(group, boxes, buffer(path, group), by_rows=source.reads_rows)

    total, done = sum(_size(move, *_region(move, box)) for move in moves for box in boxes(move)), 0
    for piece, bad in _in_threads(lambda piece: piece.fill(source), pieces()):
        non_finite[piece.move.row.theirs, piece.what] += bad
        if piece.last:
            arrays[piece.path] = _finished(piece, params[piece.path], transformed, keep)
        done += piece.nbytes
        if progress is not None:
            progress(done, total)
    if broken := +non_finite:  # those above zero
        problems = [f"{name}: {n} {what} are NaN or infinite" for (name, what), n in broken.items()]
        raise CheckpointError(source.path, problems)
    for line in [*source.notes, *([_widened(widened)] if widened else [])]:
        (notify or to_stderr)(f"{source.path.name}: {line}")
    return with_params(model, arrays)


def _finished(
    piece: Piece | KeptPiece, param: nnx.Param, transform: Transformed | None, keep: Keep | None
) -> Weight:
    """What a Param holds, once its last piece is written."""
    if isinstance(piece, KeptPiece):
        matrix = piece.buffer.finish()
        return matrix if keep is None else keep(param, matrix)  # pyright: ignore[reportReturnType]
    array = piece.buffer.finish()
    if transform is None or isinstance(piece.buffer, TableBuffer):
        return array
    return transform(piece.path, array)


def _widened(counts: Mapping[tuple[str, str], int]) -> str:
    """One line on the quantised tensors that could not stay so."""
    each = [f"{n} in {encoding} ({reason})" for (encoding, reason), n in sorted(counts.items())]
    return f"widened, not kept as stored: {', '.join(each)}"


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
