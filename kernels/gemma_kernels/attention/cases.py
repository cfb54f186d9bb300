"""Named calls with the shapes of real models, narrowed where a test's time asks for it."""

from dataclasses import dataclass

import numpy as np

from gemma_kernels.attention.spec import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call; letters as everywhere.

    Attributes:
      window: Keys a query sees; `None` for all before it.
      lengths: Real tokens per row, padded on the right; `None`: all.
      first: Position of the first query. Keys before it stand for a cache.
      ring: Keys lie in a ring: slot `p % S`, the oldest overwritten.
      images: `(first, last + 1)` rows of queries that see each other both ways.
      masked: `False` lets every query see every key.
    """

    name: str
    B: int = 1
    T: int
    S: int
    N: int = 4
    K: int = 2
    H: int = 16
    window: int | None = None
    soft_cap: float | None = None
    lengths: tuple[int, ...] | None = None
    first: int = 0
    ring: bool = False
    images: tuple[tuple[int, int], ...] = ()
    masked: bool = True

    @property
    def spec(self) -> AttentionSpec:
        in_order = self.first + self.T == self.S and not self.ring and not self.images
        return AttentionSpec(
            scale=self.H**-0.5,
            soft_cap=self.soft_cap,
            window=self.window if in_order else None,
            masked=self.masked,
        )

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 positions of queries `[B, T]` and keys `[B, S]`, -1 where there is none."""
        lengths = np.array(self.lengths or (self.T,) * self.B)[:, None]
        t = np.arange(self.T)
        q_pos = np.where(t < lengths, self.first + t, -1)
        end = self.first + lengths
        s = np.arange(self.S)
        if self.ring:
            kv_pos = (end - 1) - (end - 1 - s) % self.S
        else:
            kv_pos = np.where(s < end, s, -1)
        return q_pos.astype(np.int32), np.where(kv_pos >= 0, kv_pos, -1).astype(np.int32)

    def blocks(self) -> np.ndarray:
        """int32 `[B, T]`: number of the image that a query belongs to, 0 for none."""
        block = np.zeros((self.B, self.T), np.int32)
        for number, (start, stop) in enumerate(self.images, 1):
            block[:, start:stop] = number
        return block


CASES = (
    Case(name="global, many key tiles", T=1100, S=1100),
    Case(name="local, many query blocks", T=700, S=700, window=64),
    Case(name="local, window 1", T=300, S=300, window=1),
    Case(name="one kv head, as 270M and 1B", T=40, S=40, N=4, K=1, H=256, window=16),
    Case(name="global heads of 512, as Gemma 4", T=40, S=300, N=8, K=1, H=512, first=260),
    Case(name="27B: 32 heads of 128 on 16", T=24, S=24, N=32, K=16, H=128),
    Case(name="every head its own, as Gemma 1 7B", T=33, S=33, N=4, K=4),
    Case(name="soft cap, as Gemma 2", T=200, S=200, soft_cap=2.0, window=32),
    Case(name="ragged batch", B=3, T=150, S=150, window=20, lengths=(150, 31, 1)),
    Case(name="a row of padding alone", B=2, T=20, S=20, lengths=(20, 0)),
    Case(name="chunk on a long cache", B=2, T=140, S=1300, first=1100, lengths=(140, 70)),
    Case(name="images wider than the window", T=300, S=300, window=16, images=((5, 69), (71, 135))),
    Case(
        name="an image at the end of a long cache", T=140, S=1300, first=1100, images=((70, 134),)
    ),
    Case(name="vision tower: heads of 72, no mask", B=2, T=200, S=200, K=4, H=72, masked=False),
    Case(name="one token on a ring", T=1, S=16, window=16, first=50, ring=True),
    Case(name="one token on an empty-ended cache", T=1, S=64, first=9),
)
