"""Windows over a text that is longer than a model's context: each token is scored in one of them.

The rule is that of lm-eval's rolling log-likelihood, so that figures agree: the windows were
compared with those of `get_rolling_token_windows` and `make_disjoint_window` of lm-eval 0.4.13, and
were equal for all texts of up to 129 tokens, contexts up to 40 and strides.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `[start, stop)` are read, and those of `[first, stop]` are scored, one further on."""

    start: int
    first: int
    stop: int


def rolling_windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score every token of a text but its first, each exactly once.

    The first window reads from the beginning and scores all it can. Every other one scores the next
    `stride` tokens, or what is left of them, and reads as much in front of these as the context
    holds. lm-eval's `context_len` is `context - stride + 1`; its tasks take 1, which is a stride of
    the whole context.

    Args:
      length: Tokens of the text. The first one, BOS, is given and not scored.
      context: Tokens that the model reads at most.
      stride: Tokens that a window scores at most, but for the first window.

    Raises:
      ValueError: A stride that is no integer, or outside [1, context].

    Examples:
      >>> [(w.start, w.first, w.stop) for w in rolling_windows(10, context=4, stride=2)]
      [(0, 1, 4), (2, 5, 6), (4, 7, 8), (5, 9, 9)]
    """
    if not isinstance(stride, Integral):
        raise ValueError(f"{stride=} must be an integer, of tokens")
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride={stride} must lie between 1 and {context}, the tokens read at once"
        )
    last, stop = length - 1, min(context, length - 1)
    yield Window(0, 1, stop)
    while stop < last:
        first, stop = stop + 1, min(stop + stride, last)
        yield Window(stop - context, first, stop)
