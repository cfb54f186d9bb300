"""Rows that say which parameter of ours is which tensor of theirs. Pure data, no arrays.

One row is one fact, read from right to left to load and from left to right to export:

    Row("blocks.{i}.attn.q.w", "layers.{i}.self_attn.q_proj.weight", "(N H) D -> N H D")

`{i}` is the index of the layer in the stack that is named before it: `blocks` are the decoder's,
`vision.tower.blocks` the tower's. The letters on the right of the pattern are the `dims` of our
parameter, so their sizes come from the model and nowhere else.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from .rearrange import Rearrange

LAYER = "{i}"


@dataclass(frozen=True)
class Row:
    """One fact.

    Attributes:
      ours: Name of our parameter; `None` drops theirs on purpose.
      theirs: Name of the tensor; a glob (`vision_tower.*`) in a row that drops.
      rearrange: Theirs -> ours; `None` if the shapes are the same.
      plus_one: Theirs has one added to every value (the norms of a GGUF file).
      why: Reason for dropping.
    """

    ours: str | None
    theirs: str
    rearrange: str | None = None
    plus_one: bool = False
    why: str = ""

    def __post_init__(self):
        if (self.ours is None) != bool(self.why):
            raise ValueError(f"{self.theirs}: a row drops a tensor if and only if it says why")

    @property
    def stack(self) -> str | None:
        """Name of the stack of layers that has one such parameter per layer, if any."""
        stack, layer, _ = (self.ours or "").partition("." + LAYER)
        return stack if layer else None

    @cached_property
    def parsed(self) -> Rearrange | None:
        return None if self.rearrange is None else Rearrange.parse(self.rearrange)

    def at(self, layer: int) -> "Row":
        """The same fact for one layer."""
        index = str(layer)
        return Row(
            self.ours.replace(LAYER, index),
            self.theirs.replace(LAYER, index),
            self.rearrange,
            self.plus_one,
        )


Table = tuple[Row, ...]


def expand(table: Table, depths: Mapping[str, int]) -> dict[str, Row]:
    """Our name -> row, with one row per layer; dropping rows are left out.

    Args:
      table: Rows of any number of stacks.
      depths: Stack -> number of its layers; see `params.depths`.

    Raises:
      ValueError: two rows claim the same name of ours or of theirs.
    """
    rows = [
        row.at(i)
        for row in table
        if row.ours is not None
        for i in range(depths[row.stack] if row.stack else 1)
    ]
    for side in ("ours", "theirs"):
        names = [getattr(row, side) for row in rows]
        if len(set(names)) != len(names):
            raise ValueError(f"a name of {side} occurs in two rows: {_repeated(names)}")
    return {row.ours: row for row in rows}


def dropped(table: Table, names: Iterable[str]) -> Mapping[str, str]:
    """Those of `names` which the table drops on purpose -> why."""
    drops = [row for row in table if row.ours is None]
    return {name: row.why for name in names for row in drops if fnmatchcase(name, row.theirs)}


def _repeated(names: list[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])
