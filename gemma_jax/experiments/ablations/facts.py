"""Rows of a made-up language, with facts in it that are asked for later, for tiny models.

A word follows on the two before it: one of four, in fixed shares. Between words stand facts, one
token each, that give a key a value; a question, a token for each key, has the value for its next
token. Half of the keys are asked for soon after their fact, half far on. What words follow is a
matter of memory; a value can only be read where its fact stands.

Nothing is downloaded: NumPy makes all of it from seeds.
"""

from dataclasses import dataclass

import numpy as np

from gemma_jax.experiments.ablations.recall import (
    FAR,
    FIRST_WORD,
    NEAR,
    NOTHING,
    TEXT,
    WORDS,
    words,
)

KEYS, VALUES = 8, 8
FIRST_QUESTION = FIRST_WORD + WORDS
FIRST_VALUE = FIRST_QUESTION + KEYS
FIRST_FACT = FIRST_VALUE + VALUES
VOCABULARY = FIRST_FACT + KEYS * VALUES


@dataclass(frozen=True)
class Facts:
    """Says how long rows are, and how far questions lie from their facts.

    Attributes:
      length: Tokens per row, at least 48.
      near: Least and most distance, in tokens, of the keys that are asked for soon.
      weight: What a value that is asked for counts in training, where a word counts one.
    """

    length: int = 64
    near: tuple[int, int] = (2, 12)
    weight: float = 8.0

    def __post_init__(self):
        if self.length < 48:
            raise ValueError(f"length={self.length} must be at least 48: facts need their places")

    @property
    def far(self) -> tuple[int, int]:
        """Least and most distance of the other keys: it grows with the row."""
        return self.length // 2, self.length - 4

    def draw(self, random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and kinds, int32 `[rows, length]`."""
        tokens_BT = words(random, rows, self.length)
        kinds_BT = np.full_like(tokens_BT, TEXT)
        for row in range(rows):
            self._put_facts(random, tokens_BT[row], kinds_BT[row])
        # A word counts if both that it follows on can be seen.
        clear_BT = kinds_BT == TEXT
        known_BT = clear_BT.copy()
        for before in (1, 2):
            known_BT[:, before:] &= clear_BT[:, :-before]
        kinds_BT[clear_BT & ~known_BT] = NOTHING
        kinds_BT[:, :3] = np.where(clear_BT[:, :3], NOTHING, kinds_BT[:, :3])
        return tokens_BT, kinds_BT

    def weights(self, kinds_BT: np.ndarray) -> np.ndarray:
        """What tokens count in training, float32."""
        return np.array([0, 1, self.weight, self.weight], np.float32)[kinds_BT]

    def _put_facts(self, random: np.random.Generator, tokens, kinds) -> None:
        free = np.ones(self.length, bool)
        free[0] = False
        for at, key in enumerate(random.permutation(KEYS)):
            kind, (least, most) = (FAR, self.far) if at < KEYS // 2 else (NEAR, self.near)
            while True:
                apart = int(random.integers(least, most, endpoint=True))
                fact = int(random.integers(1, self.length - apart - 1))
                asked = fact + apart
                if free[[fact, asked, asked + 1]].all():
                    break
            free[[fact, asked, asked + 1]] = False
            value = int(random.integers(VALUES))
            tokens[fact] = FIRST_FACT + key * VALUES + value
            tokens[asked : asked + 2] = FIRST_QUESTION + key, FIRST_VALUE + value
            kinds[[fact, asked, asked + 1]] = NOTHING, NOTHING, kind
