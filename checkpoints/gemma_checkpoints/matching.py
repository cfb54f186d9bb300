"""Holds a source against a model, before any weight is read."""

from dataclasses import dataclass

import jax.numpy as jnp

from .errors import CheckpointError, by_layer
from .name_table import Row, dropped, expand
from .params import Slot, depths
from .rearrange import shape as side_shape
from .source import Source, TensorInfo

COPY = (
    "make it by Gemma(cfg, block=...) and copy into it what is loaded without `block`: "
    'nnx.update(model, nnx.state(load_model(..., layout="scan"), nnx.Param))'
)


@dataclass(frozen=True)
class Move:
    """One tensor of the source and the place it goes to."""

    name: str
    row: Row
    info: TensorInfo
    slot: Slot


def match(source: Source, slots: dict[str, Slot]) -> list[Move]:
    """One move per slot, in the order of the slots. Parts of the source without slots stay out.

    Raises:
      CheckpointError: with every tensor that is missing, surplus, or of the wrong shape or type.
    """
    rows = expand(source.table, depths(source.config))
    problems, moves, homeless = [], [], []
    for name, slot in slots.items():
        row = rows.get(name)
        info = None if row is None else source.tensors.get(row.theirs)
        if row is None:
            homeless.append(f"{name}: the model has such a parameter, a {source.format} file none")
        elif info is None:
            problems.append(f"{row.theirs} is missing: expected {list(_theirs(row, slot))}")
        elif problem := _misfit(row, slot, info):
            problems.append(problem)
        else:
            moves.append(Move(name, row, info, slot))
    problems += [f"{line}; {COPY}" for line in by_layer(homeless)]
    surplus = set(source.tensors) - {row.theirs for row in rows.values()}
    surplus -= set(dropped(source.table, surplus))
    layers = " and ".join(map(str, depths(source.config).values()))
    problems += [
        f"{name} is surplus: the config ({layers} layers) has no place for it"
        for name in sorted(surplus)
    ]
    if problems:
        raise CheckpointError(source.path, problems)
    return moves


def _misfit(row: Row, slot: Slot, info: TensorInfo) -> str | None:
    if not jnp.issubdtype(info.dtype, jnp.floating):
        return f"{row.theirs} is stored as {info.encoding}; expected F32, F16, BF16 or a GGUF type"
    if info.shape != _theirs(row, slot):
        expected = list(_theirs(row, slot))
        return f"{row.theirs} has shape {list(info.shape)}, but the config makes it {expected}"
    return None


def _theirs(row: Row, slot: Slot) -> tuple[int, ...]:
    return slot.shape if row.parsed is None else side_shape(row.parsed.left, slot.sizes)
