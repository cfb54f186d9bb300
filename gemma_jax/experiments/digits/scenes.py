"""Pictures of handwritten digits, and questions about them.

The digits are those of scikit-learn (1,797 scans of 8 x 8 pixels, from the UCI repository). One to
three of them lie in random places of a black picture, no two in the same column.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

SIDE, DIGIT = 32, 8  # pixels along a side of the picture, and of a digit
HELD_OUT = 360  # digits that no training picture shows
QUESTIONS: Mapping[str, Callable[[tuple[int, ...]], str]] = {
    "How many digits?": lambda digits: str(len(digits)),
    "Which digit is left?": lambda digits: str(digits[0]),
    "Which digit is right?": lambda digits: str(digits[-1]),
    "Read the digits.": lambda digits: "".join(map(str, digits)),
}


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, uint8 `[SIDE, SIDE]`, and its digits from left to right."""

    picture: np.ndarray
    digits: tuple[int, ...]

    def answer(self, question: str) -> str:
        return QUESTIONS[question](self.digits)


@cache
def _scans() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scans, their labels, and a fixed random order: the last `HELD_OUT` of it are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = np.round(data.images * (255 / 16)).astype(np.uint8)
    return scans, data.target, np.random.default_rng(0).permutation(len(scans))


def draw(random: np.random.Generator, *, held_out: bool = False, at_most: int = 3) -> Scene:
    """A new picture of one to `at_most` digits, out of those held out or of the others."""
    scans, labels, order = _scans()
    pool = order[-HELD_OUT:] if held_out else order[:-HELD_OUT]
    chosen = random.choice(pool, random.integers(1, at_most + 1), replace=False)
    cells = SIDE // DIGIT
    columns = DIGIT * np.sort(random.choice(cells, len(chosen), replace=False))
    rows = DIGIT * random.integers(cells, size=len(chosen))
    picture = np.zeros((SIDE, SIDE), np.uint8)
    for scan, y, x in zip(scans[chosen], rows, columns):
        picture[y : y + DIGIT, x : x + DIGIT] = scan
    return Scene(picture, tuple(int(label) for label in labels[chosen]))
