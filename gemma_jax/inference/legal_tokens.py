"""Which tokens are legal next, as the host says it: an `Allow` of packed bits.

Local letters: W words of a mask; X drafts, T = X + 1 places.
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
    """Tokens that the host says are legal next, and behind each draft that it gave.

    For loops in which a row that is not free makes one pass.

    Attributes:
      words_BTW: uint32, see `Constraint.mask`.
    """

    words_BTW: jax.Array | np.ndarray
    vocab_size: int = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        masks: Mapping[int, np.ndarray | None],
        batch: int,
        vocab_size: int,
        drafts: int = 0,
    ) -> "LegalTokens":
        """By row; in a row that is not named, or has `None`, all tokens are legal.

        Args:
          masks: Row -> `[W]`, or `[T, W]` for the first places, behind as many drafts.
          drafts: How many a row may have.

        Examples:
          >>> import numpy as np
          >>> from gemma_jax.inference.legal_tokens import LegalTokens
          >>> LegalTokens.of({1: np.array([5], np.uint32)}, 2, 4).words_BTW.tolist()
          [[[4294967295]], [[5]]]
        """
        words_BTW = np.full((batch, drafts + 1, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
        for row, mask in masks.items():
            if mask is not None:
                mask_TW = np.atleast_2d(mask)
                words_BTW[row, : len(mask_TW)] = mask_TW
        return cls(words_BTW, vocab_size)

    def __call__(self, state: State, drafts_BX: jax.Array) -> jax.Array:
        """bool `[B, X + 1, V]`. Raises `ValueError` for drafts that the host knows nothing of."""
        places = drafts_BX.shape[1] + 1
        if places > self.words_BTW.shape[1]:
            raise ValueError(
                f"expected at most {self.words_BTW.shape[1] - 1} drafts beside masks of the host, "
                f"got {places - 1}; leave one of the two out"
            )
        words_BTW = self.words_BTW[:, :places]
        bits = (words_BTW[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return bits.reshape(*words_BTW.shape[:2], -1)[..., : self.vocab_size] > 0
