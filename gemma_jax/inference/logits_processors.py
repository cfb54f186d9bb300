"""Functions of a user's own that change logits before a token is chosen, inside the compiled loop.

Local letters: X drafts of one pass, T = X + 1 tokens of which one is the model's own.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

LogitsProcessor = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits_BV, text_BS) -> logits_BV`.

`logits_BV` are float32, after the repetition penalty and before all other rules, as for a custom
processor of transformers. `text_BS` is int32: the token at position `s` of each row, prompt
included, and -1 where there is none yet; placeholders of pictures may lie beyond the vocabulary.
What comes back has the shape of the logits; -inf forbids a token, and a function that forbids all
of them, or returns NaN, gives id 0. The function is traced once: it may use no Python `if` on
values, and what else it reads (a variable around it, an attribute) stays what it was then. Arrays
that change go in by `jax.tree_util.Partial`. Rows that wait or are empty are computed, and not
used. A draft model does not know the functions, so where they decide much, its drafts are thrown
away: better without `draft`.
"""


def as_processors(given: LogitsProcessor | Sequence[LogitsProcessor]) -> tuple:
    """One function or several as pytrees, which the loop takes as input.

    What is a pytree already stays as it is: the arrays of `jax.tree_util.Partial(f, bias_V)`, where
    `f(bias_V, logits_BV, text_BS)`, may change without a compilation. Any other function is known
    by its identity, and one that is defined anew compiles anew.

    Raises:
      ValueError: Something that cannot be called.
    """
    processors = (given,) if callable(given) else tuple(given)
    for processor in processors:
        if not callable(processor):
            raise ValueError(
                f"a logits processor must be a function (logits_BV, text_BS) -> logits_BV, got "
                f"{processor!r:.80}"
            )
    leaf = jax.tree_util.all_leaves
    return tuple(Partial(one) if leaf([one]) else one for one in processors)


def process(
    processors: Sequence[LogitsProcessor], logits_BV: jax.Array, text_BS: jax.Array | None
) -> jax.Array:
    """Logits after all processors, each of which sees what the one before returned.

    Raises:
      ValueError: A processor returned something else than logits of this shape.
    """
    for processor in processors:
        out = processor(logits_BV, text_BS)
        dtype, shape = getattr(out, "dtype", None), getattr(out, "shape", None)
        if dtype is None or shape != logits_BV.shape or not jnp.issubdtype(dtype, jnp.floating):
            found = type(out).__name__ if dtype is None else f"{dtype} {list(shape)}"
            raise ValueError(
                f"the logits processor {_name(processor)} returned {found}; expected logits of the "
                f"shape it got, {logits_BV.dtype} {list(logits_BV.shape)}"
            )
        logits_BV = jnp.asarray(out, logits_BV.dtype)
    return logits_BV


def process_drafts(
    processors: Sequence[LogitsProcessor],
    logits_BTV: jax.Array,
    text_BS: jax.Array | None,
    drafts_BX: jax.Array,
) -> jax.Array:
    """`process` before each draft and after the last: each sees the drafts before it as text."""
    if not processors:
        return logits_BTV
    length_B = None if text_BS is None else _length(text_BS)
    steps = [process(processors, logits_BTV[:, 0], text_BS)]
    for x in range(drafts_BX.shape[1]):
        if text_BS is not None:
            text_BS = _put(text_BS, drafts_BX[:, x : x + 1], (length_B + x)[:, None])
        steps.append(process(processors, logits_BTV[:, x + 1], text_BS))
    return jnp.stack(steps, axis=1)


def put_prompt(
    text_BS: jax.Array | None, tokens_BT: jax.Array, positions_BT: jax.Array
) -> jax.Array | None:
    """Writes a piece of prompt to its positions; what stood there and behind is gone."""
    if text_BS is None:
        return None
    S = text_BS.shape[1]
    start_B = jnp.min(jnp.where(positions_BT >= 0, positions_BT, S), axis=1)
    text_BS = jnp.where(jnp.arange(S) < start_B[:, None], text_BS, -1)
    return _put(text_BS, tokens_BT, positions_BT)


def put_behind(
    text_BS: jax.Array | None, tokens_BT: jax.Array, within_BT: jax.Array
) -> jax.Array | None:
    """Writes those tokens that are within behind the text of each row."""
    if text_BS is None:
        return None
    positions_BT = _length(text_BS)[:, None] + jnp.arange(tokens_BT.shape[1])
    return _put(text_BS, tokens_BT, jnp.where(within_BT, positions_BT, -1))


def _length(text_BS: jax.Array) -> jax.Array:
    return jnp.sum(text_BS >= 0, axis=1)


def _put(text_BS: jax.Array, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Positions below 0 and beyond the row are dropped."""
    rows_B1 = jnp.arange(len(text_BS))[:, None]
    at_BT = jnp.where(positions_BT >= 0, positions_BT, text_BS.shape[1])
    return text_BS.at[rows_B1, at_BT].set(tokens_BT, mode="drop")


def _name(processor: LogitsProcessor) -> str:
    inner = processor
    while hasattr(inner, "func"):  # of a `Partial`
        inner = inner.func
    return getattr(inner, "__name__", type(inner).__name__)
