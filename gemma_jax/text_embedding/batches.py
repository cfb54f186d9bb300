"""Rows of different lengths as batches of few shapes, with little padding."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import jax
import numpy as np

from gemma_jax.decoder.batch import power_of_two

LEAST = 16  # tokens of the narrowest batch
# Tokens of a batch: on a CPU as many as fill its products, elsewhere as many as fill a chip.
ON_CPU, ELSEWHERE = 2_048, 32_768


def padded_length(length: int) -> int:
    """`length` rounded up to 16, 24, 32, 48, 64, 96, ...: beyond 16, less than a third is padding.

    >>> [padded_length(n) for n in (1, 17, 25, 65, 1000)]
    [16, 24, 32, 96, 1024]
    """
    size = LEAST
    while size < length:
        size *= 2
    between = size * 3 // 4
    return between if LEAST < length <= between else size


def batches(
    lengths: Sequence[int], tokens: int | None = None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Which rows go together: `(their indices, rows of the batch, width of the batch)`.

    Rows of one width follow each other, longest first. All batches of a width have as many rows, a
    power of two; only the last one may have fewer, and as many empty ones as make it one again.

    Args:
      lengths: Of each row, in tokens.
      tokens: Of a batch, about; default: by platform.
    """
    if tokens is None:
        tokens = ON_CPU if jax.default_backend() == "cpu" else ELSEWHERE
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for width, group in groupby(order, key=lambda i: padded_length(lengths[i])):
        members, most = list(group), 1
        while 2 * most * width <= tokens:
            most *= 2
        for start in range(0, len(members), most):
            some = members[start : start + most]
            yield np.array(some), min(most, power_of_two(len(some))), width
