"""Prompts of any lengths, cut into passes whose shapes repeat.

Every row is cut on its own, so that no cut goes through an image: its tokens see each other both
ways and must be read together. Shapes are rounded up to buckets, so that a program is compiled once
per bucket and not once per prompt:

    tokens in a pass    16, 32, 64, ... 1024, then multiples of 1024
    images in a pass    1, 2, 4, 8, ...

Local letters: I items that soft tokens come in.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.config import VisionConfig
from gemma_jax.decoder.soft_tokens import SoftTokens


def bucket(n: int) -> int:
    """`n` rounded up to 16, 32, 64, ..., 1024, 2048, 3072, ..."""
    if n > 1024:
        return -(-n // 1024) * 1024
    return max(16, _power_of_two(n))


@dataclass(frozen=True)
class Row:
    """Text on its way into one row.

    Attributes:
      ids: Its tokens; the first gets position `start`.
      index: Which of its soft tokens stands at a place, -1 for a token of text.
      soft_ITD: Soft tokens of its images.
    """

    ids: np.ndarray
    start: int
    index: np.ndarray
    soft_ITD: jax.Array | None

    @classmethod
    def of(
        cls,
        ids: list[int],
        start: int,
        soft_ITD: jax.Array | None,
        cfg: VisionConfig | None,
        *,
        written: int = 0,
    ) -> "Row":
        """A row for a model with the tower `cfg`, if it has one.

        Args:
          written: That many ids in front are the model's own words, whatever they look like.
        """
        ids = np.array(ids, np.int32)
        is_soft = np.zeros(len(ids), bool) if cfg is None else ids == cfg.image_token
        is_soft[:written] = False
        given = 0 if soft_ITD is None else soft_ITD.shape[0] * soft_ITD.shape[1]
        if (places := int(is_soft.sum())) != given:
            raise ValueError(
                f"{places} placeholders of soft tokens in the prompt, {given} soft tokens given; "
                "every image needs its run of placeholders"
            )
        return cls(ids, start, np.where(is_soft, np.cumsum(is_soft) - 1, -1), soft_ITD)

    @cached_property
    def image(self) -> np.ndarray:
        """Number of the image at each place, -1 in text."""
        size = 1 if self.soft_ITD is None else self.soft_ITD.shape[1]
        return np.where(self.index < 0, -1, self.index // size)

    def cuts(self, width: int) -> list[slice]:
        """Pieces of at most `width` tokens; longer where an image, which stays whole, needs it."""
        pieces, begin = [], 0
        while begin < len(self.ids):
            end = min(begin + width, len(self.ids))
            if end < len(self.ids) and self.image[end] >= 0:
                inside = np.flatnonzero(self.image == self.image[end])
                end = int(inside[0]) if inside[0] > begin else int(inside[-1]) + 1
            pieces.append(slice(begin, end))
            begin = end
        return pieces


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pass:
    """One piece of every row, padded on the right.

    Attributes:
      tokens_BT: int32.
      positions_BT: int32, -1 for padding.
      soft: Soft tokens of the images in this pass; `None` if it is all text.
      ends_B: bool; rows that end in this pass.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    soft: SoftTokens | None
    ends_B: np.ndarray


def prefill_chunk(rows: list[Row], parts: list[slice | None]) -> Pass:
    """The given part of each row; `None` where a row takes no part in this pass."""
    width = bucket(max(part.stop - part.start for part in parts if part))
    tokens_BT = np.zeros((len(rows), width), np.int32)
    positions_BT = np.full_like(tokens_BT, -1)
    index_BT = np.full_like(tokens_BT, -1)
    block_BT = np.zeros_like(tokens_BT)
    images: list[jax.Array] = []
    for i, (row, part) in enumerate(zip(rows, parts)):
        if part is None:
            continue
        n = part.stop - part.start
        tokens_BT[i, :n] = row.ids[part]
        positions_BT[i, :n] = row.start + np.arange(part.start, part.stop)
        block_BT[i, :n] = row.image[part] + 1
        if numbers := sorted(set(row.image[part].tolist()) - {-1}):
            shift = (len(images) - numbers[0]) * row.soft_ITD.shape[1]
            index_BT[i, :n] = np.where(row.image[part] >= 0, row.index[part] + shift, -1)
            images += [row.soft_ITD[number] for number in numbers]
    ends_B = np.array([p is not None and p.stop == len(row.ids) for row, p in zip(rows, parts)])
    soft = None
    if images:
        images += [jnp.zeros_like(images[0])] * (_power_of_two(len(images)) - len(images))
        soft = SoftTokens(embeddings_ITD=jnp.stack(images), index_BT=index_BT, block_BT=block_BT)
    return Pass(tokens_BT, positions_BT, soft, ends_B)


def _power_of_two(n: int) -> int:
    """`n` rounded up to 1, 2, 4, 8, ..."""
    return 1 << (n - 1).bit_length()
