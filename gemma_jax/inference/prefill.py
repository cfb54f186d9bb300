"""Prompts of any lengths, cut into chunks whose shapes repeat.

Every row is cut on its own, so that no cut goes through a block whose tokens see each other both
ways: it must be read together. Shapes are rounded up to buckets, so that a program is compiled once
per bucket and not once per prompt:

    tokens in a chunk                 16, 32, 64, ... 1024, then multiples of 1024
    items in a chunk, tokens of one   1, 2, 4, 8, ...

Local letters: I items that soft tokens come in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch, power_of_two
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.multimodal.modality import Modality
from gemma_jax.multimodal.placeholders import check_places


def bucket(n: int) -> int:
    """`n` rounded up to 16, 32, 64, ..., 1024, 2048, 3072, ..."""
    if n > 1024:
        return -(-n // 1024) * 1024
    return max(16, power_of_two(n))


@dataclass(frozen=True)
class PromptRow:
    """Text on its way into one row.

    Attributes:
      ids: Its tokens; the first gets position `start`.
      item: Which of the items in `soft` stands at a place, -1 for a token of text.
      offset: Which of the soft tokens of that item.
      block: The same as `item` where the item's tokens see each other both ways, else -1.
      soft: Soft tokens `[T, D]` of each item.
    """

    ids: np.ndarray
    start: int
    item: np.ndarray
    offset: np.ndarray
    block: np.ndarray
    soft: Sequence[jax.Array]

    @classmethod
    def of(
        cls,
        ids: list[int],
        start: int,
        soft: Sequence[jax.Array] | None,
        modalities: Sequence[Modality],
        *,
        written: int = 0,
    ) -> "PromptRow":
        """A row for a model that reads these modalities.

        Args:
          soft: In the order of the text.
          written: That many ids in front are the model's own words, whatever they look like.
        """
        soft = [] if soft is None else list(soft)
        ids = np.array(ids, np.int32)
        is_soft = np.isin(ids, [m.placeholder for m in modalities])
        is_soft[:written] = False
        lengths = [len(one) for one in soft]
        check_places(int(is_soft.sum()), sum(lengths))
        item, offset = np.full(len(ids), -1), np.zeros(len(ids), int)
        item[is_soft] = np.repeat(np.arange(len(soft)), lengths)
        offset[is_soft] = [place for length in lengths for place in range(length)]
        both_ways = np.isin(ids, [m.placeholder for m in modalities if m.bidirectional])
        return cls(ids, start, item, offset, np.where(both_ways, item, -1), soft)

    def cuts(self, width: int) -> list[slice]:
        """Pieces of at most `width` tokens; longer where a block, which stays whole, needs it."""
        pieces, begin = [], 0
        while begin < len(self.ids):
            end = min(begin + width, len(self.ids))
            if end < len(self.ids) and self.block[end] >= 0:
                inside = np.flatnonzero(self.block == self.block[end])
                end = int(inside[0]) if inside[0] > begin else int(inside[-1]) + 1
            pieces.append(slice(begin, end))
            begin = end
        return pieces


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillChunk:
    """One piece of every row.

    Attributes:
      batch: The pieces, padded on the right.
      ends_B: bool; rows that end in this chunk. `None` where none does: nobody reads logits then,
        and the program of the chunk computes none.
    """

    batch: Batch
    ends_B: np.ndarray | None


def prefill_chunk(rows: list[PromptRow], parts: list[slice | None]) -> PrefillChunk:
    """The given part of each row; `None` where a row takes no part in this chunk."""
    width = bucket(max(part.stop - part.start for part in parts if part))
    tokens_BT = np.zeros((len(rows), width), np.int32)
    positions_BT = np.full_like(tokens_BT, -1)
    item_BT, offset_BT = np.full_like(tokens_BT, -1), np.zeros_like(tokens_BT)
    block_BT = np.zeros_like(tokens_BT)
    items: list[jax.Array] = []
    for i, (row, part) in enumerate(zip(rows, parts)):
        if part is None:
            continue
        n = part.stop - part.start
        tokens_BT[i, :n] = row.ids[part]
        positions_BT[i, :n] = row.start + np.arange(part.start, part.stop)
        block_BT[i, :n] = row.block[part] + 1
        if numbers := sorted(set(row.item[part].tolist()) - {-1}):
            shift = len(items) - numbers[0]
            item_BT[i, :n] = np.where(row.item[part] >= 0, row.item[part] + shift, -1)
            offset_BT[i, :n] = row.offset[part]
            items += [row.soft[number] for number in numbers]
    ends_B = np.array([p is not None and p.stop == len(row.ids) for row, p in zip(rows, parts)])
    soft = None
    if items:
        embeddings_ITD = _stacked(items)
        index_BT = np.where(item_BT >= 0, item_BT * embeddings_ITD.shape[1] + offset_BT, -1)
        soft = SoftTokens(
            embeddings_ITD=embeddings_ITD,
            index_BT=index_BT.astype(np.int32),
            block_BT=block_BT if block_BT.any() else None,
        )
    batch = Batch(tokens_BT, positions_BT, soft=soft)
    return PrefillChunk(batch, ends_B if ends_B.any() else None)


def _stacked(items: list[jax.Array]) -> jax.Array:
    """`[I, T, D]` of items `[T, D]`, both axes filled up with zeros."""
    width = power_of_two(max(len(one) for one in items))
    same = [jnp.pad(one, ((0, width - len(one)), (0, 0))) for one in items]
    same += [jnp.zeros_like(same[0])] * (power_of_two(len(same)) - len(same))
    return jnp.stack(same)
