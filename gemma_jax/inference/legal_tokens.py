"""Which tokens are legal next, as the host says it: an `Allow` of packed bits.

Local letters: W words of a mask; X drafts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.inference.decode import State


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LegalTokens:
    """Tokens that the host says are legal next, for loops that choose one token per row.

    Attributes:
      words_BW: uint32, see `Constraint.mask`.
    """

    words_BW: jax.Array | np.ndarray
    vocab_size: int = field(metadata={"static": True})

    @classmethod
    def of(
        cls, masks: Mapping[int, np.ndarray | None], batch: int, vocab_size: int
    ) -> "LegalTokens":
        """By row; in a row that is not named, or has `None`, all tokens are legal.

        Examples:
          >>> import numpy as np
          >>> from gemma_jax.inference.legal_tokens import LegalTokens
          >>> LegalTokens.of({1: np.array([5], np.uint32)}, 2, 4).words_BW.tolist()
          [[4294967295], [5]]
        """
        words_BW = np.full((batch, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
        for row, mask_W in masks.items():
            if mask_W is not None:
                words_BW[row] = mask_W
        return cls(words_BW, vocab_size)

    def __call__(self, state: State, drafts_BX: jax.Array) -> jax.Array:
        """bool `[B, 1, V]`. Raises `ValueError` with drafts, of which the host knows nothing."""
        if drafts_BX.shape[1]:
            raise ValueError(
                "expected no drafts beside masks of the host; leave one of the two out"
            )
        bits = (self.words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return bits.reshape(len(bits), 1, -1)[..., : self.vocab_size] > 0
