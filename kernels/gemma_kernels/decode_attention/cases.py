"""Named decoding steps with the shapes of real models, narrowed where a test's time asks for it."""

from dataclasses import dataclass

import numpy as np

from gemma_kernels.attention.spec import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class Case:
    """One decoding step; letters as everywhere.

    Attributes:
      lengths: Tokens of each row, the `T` new ones included; 0 for a row without any.
      T: New tokens of a row that has that many.
      window: Keys a query sees; `None` for all before it.
      shuffled: Slots in random order, instead of position `p` in slot `p % S`.
    """

    name: str
    lengths: tuple[int, ...]
    T: int = 1
    S: int
    N: int = 4
    K: int = 1
    H: int = 256
    window: int | None = None
    soft_cap: float | None = None
    shuffled: bool = False

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(scale=self.H**-0.5, soft_cap=self.soft_cap)

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 positions of queries `[B, T]` and slots `[B, S]`, -1 where there is none."""
        last = np.array(self.lengths)[:, None] - 1
        q_pos = last - np.arange(self.T)[::-1]
        kv_pos = last - (last - np.arange(self.S)) % self.S
        if self.shuffled:
            kv_pos = np.random.default_rng(0).permuted(kv_pos, axis=1)
        return tuple(np.maximum(pos, -1).astype(np.int32) for pos in (q_pos, kv_pos))


CASES = (
    Case(name="270M and 1B, local", lengths=(300, 511), S=512, window=512),
    Case(name="1B, ring at its turn", lengths=(512, 513, 514), S=512, window=512),
    Case(name="1B, ring with room for drafts", lengths=(1000, 517), T=5, S=640, window=512),
    Case(name="4B, global", lengths=(1100, 40), S=1280, N=4, K=2),
    Case(name="12B, local", lengths=(3000,), S=1024, N=4, K=2, window=1024),
    Case(name="27B, heads of 128", lengths=(700, 90), S=768, N=8, K=4, H=128),
    Case(name="3n, local", lengths=(70, 1025, 5), S=512, N=4, K=1, window=512),
    Case(name="every head its own", lengths=(200,), S=256, N=2, K=2, H=128),
    Case(name="three heads of 128", lengths=(200,), S=256, N=6, K=3, H=128),
    Case(name="16 new tokens", lengths=(500, 16), T=16, S=512, N=4, K=1, window=100),
    Case(name="soft cap, as Gemma 2", lengths=(300, 20), S=384, N=4, K=2, soft_cap=2.0),
    Case(name="rows of nothing", lengths=(0, 5, 0), S=1024, N=2, H=128),
    Case(name="nothing at all", lengths=(0, 0), S=256, N=2, H=128),
    Case(name="fewer tokens than asked for", lengths=(2, 300), T=5, S=384),
    Case(name="positions beyond 100,000", lengths=(131_000,), S=512, window=512),
    Case(name="slots in any order", lengths=(900, 300), T=2, S=1024, window=64, shuffled=True),
    Case(name="one token of one", lengths=(1,), S=256, H=128),
)
