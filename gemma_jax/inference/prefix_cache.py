"""Keeps what was read of prompts, for those that begin alike.

A snapshot holds one row's cache at the end of a chunk: its rings whole, for a ring cannot go back,
and of the layers that keep everything the slots of this chunk alone. The snapshots of one prompt
form a chain, and prompts that begin alike share its beginning. A snapshot is found by all that went
into it: the one before it, the ids of its chunk, and its soft tokens. Nothing is ever found by a
part of that.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_jax.inference.prefill import PromptRow

Key = tuple[int, bytes, bytes]  # number of the snapshot before, ids, digest of soft tokens


@dataclass(frozen=True)
class Snapshot:
    """Holds one row's cache at the end of a chunk.

    Attributes:
      number: Never given to another one.
      start, stop: Positions of the chunk.
      arrays: As `Slots.snapshot` makes them.
    """

    number: int
    start: int
    stop: int
    arrays: Sequence[np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class PrefixCache:
    """Keeps snapshots in the host's memory, those used last.

    Args:
      budget: Bytes.
    """

    def __init__(self, budget: int):
        self._budget, self.nbytes = budget, 0
        self._kept: OrderedDict[Key, Snapshot] = OrderedDict()
        self._roots: dict[str | None, int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, row: PromptRow, parts: Sequence[slice], adapter: str | None) -> list[Snapshot]:
        """The longest chain that fits the beginning of a prompt, cut into these parts."""
        chain, keys = [], []
        before = self._root(adapter)
        for part in parts:
            key = (before, *_content(row, part))
            if key not in self._kept:
                break
            keys.append(key)
            chain.append(self._kept[key])
            before = chain[-1].number
        for key in reversed(keys):  # the beginning last: it goes after what needs it
            self._kept.move_to_end(key)
        return chain

    def put(
        self,
        row: PromptRow,
        part: slice,
        adapter: str | None,
        chain: Sequence[Snapshot],
        arrays: Sequence[np.ndarray],
    ) -> Snapshot | None:
        """Keeps a snapshot that comes after `chain`; `None` if it is too large to be kept."""
        before = chain[-1].number if chain else self._root(adapter)
        new = Snapshot(next(self._numbers), part.start, part.stop, arrays)
        if new.nbytes > self._budget:
            return None
        key = (before, *_content(row, part))
        old = self._kept.pop(key, None)
        self.nbytes += new.nbytes - (0 if old is None else old.nbytes)
        self._kept[key] = new
        numbers = {one.number for one in chain}
        for other in [k for k, one in reversed(self._kept.items()) if one.number in numbers]:
            self._kept.move_to_end(other)
        while self.nbytes > self._budget:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return new

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()
        self.nbytes = 0

    def _root(self, adapter: str | None) -> int:
        if adapter not in self._roots:
            self._roots[adapter] = next(self._numbers)
        return self._roots[adapter]


def _content(row: PromptRow, part: slice) -> tuple[bytes, bytes]:
    """Ids as they are, and a digest of the soft tokens and of which of them see each other."""
    digest = hashlib.sha256()
    for i in range(part.start, part.stop):
        if row.item[i] >= 0:
            soft_D = np.ascontiguousarray(np.asarray(row.soft[row.item[i]])[row.offset[i]])
            digest.update(f"{i} {row.block[i] >= 0} {soft_D.dtype} {soft_D.shape} ".encode())
            digest.update(soft_D.tobytes())
    return np.ascontiguousarray(row.ids[part]).tobytes(), digest.digest()
