"""Rows of a made-up language in which some passages come twice, for tiny models to tell apart.

A word follows on the two before it: one of four, in fixed shares. Two passages of random symbols,
each behind a mark of its own, lie in every row, and come again: one soon after, one far on. What
words follow is a matter of memory; the symbols can only be read where they came first.

Nothing is downloaded: NumPy makes all of it from seeds.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

START, MARKS, WORDS, SYMBOLS = 1, 4, 16, 16
FIRST_WORD = 2 + MARKS
FIRST_SYMBOL = FIRST_WORD + WORDS
VOCABULARY = FIRST_SYMBOL + SYMBOLS
SHARES = (0.55, 0.25, 0.15, 0.05)  # of the four words that may follow
FLOOR = -sum(share * np.log(share) for share in SHARES)  # nats per word, of who knows the language
NOTHING, TEXT, NEAR, FAR = range(4)  # what a token is to be scored as
KINDS = {"text": TEXT, "near": NEAR, "far": FAR}


@dataclass(frozen=True)
class Recall:
    """Says how long rows are, and how far apart passages lie.

    Attributes:
      length: Tokens per row, at least 80.
      passage: Symbols per passage.
      near: Least and most distance of the passage that comes again soon.
    """

    length: int = 96
    passage: int = 8
    near: tuple[int, int] = (16, 24)

    @property
    def far(self) -> tuple[int, int]:
        """Least and most distance of the other one: it grows with the row."""
        return self.length * 5 // 8, self.length * 3 // 4

    def draw(self, random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and kinds, int32 `[rows, length]`."""
        tokens_BT = words(random, rows, self.length)
        hidden_BT = np.zeros_like(tokens_BT, bool)
        kinds_BT = np.full_like(tokens_BT, TEXT)
        for row in range(rows):
            self._put_passages(random, tokens_BT[row], kinds_BT[row], hidden_BT[row])
        # A word counts if both that it follows on can be seen.
        for before in (1, 2):
            hidden_BT[:, before:] |= kinds_BT[:, :-before] != TEXT
        kinds_BT[:, :3] = NOTHING
        kinds_BT[hidden_BT & (kinds_BT == TEXT)] = NOTHING
        return tokens_BT, kinds_BT

    def weights(self, kinds_BT: np.ndarray) -> np.ndarray:
        """What tokens count in training, float32."""
        return (kinds_BT != NOTHING).astype(np.float32)

    def _put_passages(self, random, tokens, kinds, hidden) -> None:
        size = self.passage + 1
        first = int(random.integers(2, 9))
        again = first + int(random.integers(*self.far, endpoint=True))
        apart = int(random.integers(*self.near, endpoint=True))
        second = int(random.integers(first + size + 3, again - apart - size - 3, endpoint=True))
        marks = 2 + random.permutation(MARKS)[:2]
        for mark, source, copy, kind in (
            (marks[0], first, again, FAR), (marks[1], second, second + apart, NEAR)
        ):  # fmt: skip
            passage = FIRST_SYMBOL + random.integers(0, SYMBOLS, self.passage)
            for place, counts in ((source, NOTHING), (copy, kind)):
                tokens[place : place + size] = [mark, *passage]
                kinds[place] = NOTHING
                kinds[place + 1 : place + size] = counts


@cache
def _followers() -> np.ndarray:
    """Four words for any two, int32 `[WORDS, WORDS, 4]`: the language."""
    random = np.random.default_rng(0)
    pairs = [random.permutation(WORDS)[:4] for _ in range(WORDS * WORDS)]
    return np.array(pairs, np.int32).reshape(WORDS, WORDS, 4)


def words(random: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """A start, and words without an end, int32 `[rows, length]`."""
    chosen_BT = random.choice(4, (rows, length), p=SHARES)
    words_BT = np.zeros((rows, length), np.int32)
    words_BT[:, :2] = random.integers(0, WORDS, (rows, 2))
    for t in range(2, length):
        four = _followers()[words_BT[:, t - 2], words_BT[:, t - 1]]
        words_BT[:, t] = four[np.arange(rows), chosen_BT[:, t]]
    words_BT += FIRST_WORD
    words_BT[:, 0] = START
    return words_BT
