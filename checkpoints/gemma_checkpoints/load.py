"""Streams a checkpoint into a model, piece by piece, each straight to its device and dtype.

Threads read, decode and check pieces, and write them into the parameters. Host memory holds one
piece per thread and nothing else, so the peak is the model plus less than its largest tensor. On a
mesh, a process reads what its own devices hold. Quantised tensors may stay as they are (`kept.py`).
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
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
from .pieces import Piece, pieces_of, region, size
from .select_parts import config_for
from .source import Source

AHEAD = 8  # pieces waiting per thread
TABLE: ParamPath = ("per_layer", "table")

Placement = Callable[[ParamPath, str, tuple[int, ...]], jax.sharding.Sharding | None]
Transformed = Callable[[ParamPath, jax.Array], Weight]
Transform = Callable[[Gemma], Transformed]
Item, Result = TypeVar("Item"), TypeVar("Result")


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
    if transformed is not None:  # the largest arrays are made narrower before others are held
        entries = {path: params[path].get_value().size for path in groups}
        groups = {path: groups[path] for path in sorted(groups, key=lambda p: -entries[p])}
    moves = [move for group in groups.values() for move in group]

    def pieces() -> Iterator[Piece | KeptPiece]:
        for path, group in groups.items():
            if (matrix := kept(path, group)) is not None:
                regions = lambda move: [region(move, box) for box in boxes(move)]  # noqa: E731
                yield from kept_pieces(group, matrix, regions)
            else:
                yield from pieces_of(group, boxes, buffer(path, group), by_rows=source.reads_rows)

    total, done = sum(size(move, *region(move, box)) for move in moves for box in boxes(move)), 0
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
