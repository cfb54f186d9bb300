"""Invertible reshapes and permutations, written as text.

`"(N H) D -> N H D"` splits the first axis of a matrix into heads; `"D N H -> N H D"` permutes.
Both sides hold the same letters once each, so reading a pattern backwards undoes it. A `1` is an
axis of that size, which the other side may lack: `"F C 1 1 -> F C"`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Side = tuple[str, ...]  # one string of letters per axis: ("NH", "D"); none for an axis of size 1


@dataclass(frozen=True)
class Rearrange:
    """A parsed pattern. `Rearrange.parse(text)` is the way in."""

    left: Side
    right: Side

    @classmethod
    def parse(cls, pattern: str) -> "Rearrange":
        left, arrow, right = pattern.partition("->")
        sides = _parse_side(left), _parse_side(right)
        letters = [sorted("".join(side)) for side in sides]
        if not arrow or letters[0] != letters[1] or len(set(letters[0])) != len(letters[0]):
            raise ValueError(f"{pattern=} must hold the same letters on both sides, once each")
        return cls(*sides)

    @property
    def inverse(self) -> "Rearrange":
        return Rearrange(self.right, self.left)

    @property
    def keeps_first_axis(self) -> bool:
        """Whether rows of the input are rows of the output: then it can be done piece by piece."""
        return self.left[0] == self.right[0]

    def __call__(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """`array` of shape `shape(left)` -> shape `shape(right)`; a view where NumPy can."""
        source, target = "".join(self.left), "".join(self.right)
        array = array.reshape([sizes[letter] for letter in source])
        return array.transpose([source.index(letter) for letter in target]).reshape(
            shape(self.right, sizes)
        )


def shape(side: Side, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in side)


def _parse_side(text: str) -> Side:
    axes, group = [], None
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(" and group is None:
            group = ""
        elif token == ")" and group:
            axes.append(group)
            group = None
        elif token == "1" and group is None:
            axes.append("")
        elif len(token) != 1 or not token.isalpha():
            raise ValueError(f"unexpected {token!r} in {text!r}")
        elif group is None:
            axes.append(token)
        else:
            group += token
    if group is not None or not axes:
        raise ValueError(f"expected axes and closed groups, got {text!r}")
    return tuple(axes)
