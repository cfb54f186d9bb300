"""Log-probabilities of continuations of contexts; what several have in common is read once.

    what a batch begins with    Answer in one word.                     one row
    contexts                      Q: The capital of France? A:          a row each
    continuations                   Paris | London | Rome               a row each

The rows of each line go on from copies of the caches of the line above. A context and its choices
thus cost the context and the choices, and not as many contexts as choices; continuations that
differ in their last token alone, such as the letters of answers, are one row.

Batches are made of all that is asked, sorted: so results do not depend on its order, and on what
else is asked by rounding alone. Numbers of rows and tokens are rounded up to powers of two: few
programs are compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch, power_of_two
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.prefill import bucket
from gemma_jax.placement import empty_cache

CHUNK = 1024  # tokens of a row that one pass reads
BATCH_TOKENS = 2048  # of all rows together
SHARED = 32  # tokens that contexts have in common from which on these are worth a pass of their own

Ids = tuple[int, ...]
Pair = tuple[Sequence[int], Sequence[int]]


class TokenScores(NamedTuple):
    """Of every token of a continuation: its log-probability, and whether it is the likeliest.

    Attributes:
      log_probs: float32, nats.
      greedy: bool; two tokens of the same logit are both the likeliest.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> asked, said = tok.encode("Which digit is left?", bos=True), tok.encode("64")
      >>> gj.score_continuations(model, [(asked, said)])[0].log_probs.shape
      (2,)
    """

    log_probs: np.ndarray
    greedy: np.ndarray


class _Row(NamedTuple):
    """What is read behind the beginning of a context, and the tokens that may come at its end."""

    ids: Ids  # the context's last token, and the continuation without its last
    ends: Ids


class _Question(NamedTuple):
    beginning: Ids  # the context without its last token
    rows: tuple[_Row, ...]

    @property
    def length(self) -> int:
        return len(self.beginning) + max(len(row.ids) for row in self.rows)


def score_continuations(
    model: Gemma,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenScores]:
    """Computes the log-probability of each token of continuations, given contexts.

    Args:
      pairs: Ids of a context, at least one, and of its continuation, which may be empty.
      batch_tokens: Tokens of one pass, over all its rows; bounds the memory that activations take.
      progress: Told how many of the contexts have been dealt with, and how many there are.

    Returns:
      One `TokenScores` per pair.

    Raises:
      ValueError: An empty context, ids outside `[0, V)`, or a pair that is longer than the model's
        context, its last token not counted.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> asked = tok.encode("Which digit is left?", bos=True)
      >>> scores = gj.score_continuations(model, [(asked, tok.encode(n)) for n in ("7", "8")])
      >>> [score.log_probs.shape for score in scores], scores[0].greedy.tolist()
      ([(1,), (1,)], [False])
    """
    if batch_tokens < 1:
        raise ValueError(f"{batch_tokens=} must be at least 1")
    pairs = [_checked(model, context, continuation) for context, continuation in pairs]
    questions = _questions(pairs)
    found: dict[tuple[Ids, Ids], TokenScores] = {}
    done = 0
    for batch in _batches(questions, batch_tokens):
        found |= _score_batch(model, batch, batch_tokens)
        if progress is not None:
            progress(done := done + len(batch), len(questions))
    empty = TokenScores(np.zeros(0, np.float32), np.zeros(0, bool))
    return [found[pair] if pair[1] else empty for pair in pairs]


def _checked(model: Gemma, context: Sequence[int], continuation: Sequence[int]) -> tuple[Ids, Ids]:
    pair = tuple(int(i) for i in context), tuple(int(i) for i in continuation)
    ids, cfg = pair[0] + pair[1], model.cfg
    if not pair[0]:
        raise ValueError("a context needs a token at least, such as BOS")
    if min(ids) < 0 or max(ids) >= cfg.vocab_size:
        raise ValueError(f"ids must lie in [0, {cfg.vocab_size}), got {min(ids)} to {max(ids)}")
    if len(ids) - 1 > cfg.max_positions:
        raise ValueError(
            f"a context of {len(pair[0])} tokens and a continuation of {len(pair[1])} do not fit "
            f"the model's context of {cfg.max_positions}; shorten the one in front"
        )
    return pair


def _questions(pairs: Sequence[tuple[Ids, Ids]]) -> list[_Question]:
    """Continuations by the beginning of their contexts, sorted: long ones first."""
    asked: dict[Ids, dict[Ids, set[int]]] = {}
    for context, continuation in pairs:
        if continuation:
            rows = asked.setdefault(context[:-1], {})
            rows.setdefault(context[-1:] + continuation[:-1], set()).add(continuation[-1])
    questions = [
        _Question(
            beginning, tuple(_Row(ids, tuple(sorted(ends))) for ids, ends in sorted(rows.items()))
        )
        for beginning, rows in asked.items()
    ]
    return sorted(questions, key=lambda one: (-bucket(one.length), one.beginning))


def _batches(questions: list[_Question], batch_tokens: int) -> Iterator[list[_Question]]:
    """Questions of one length bucket, as many as are read in one pass."""
    for length, group in groupby(questions, key=lambda one: bucket(one.length)):
        same, count = list(group), _floor_power(batch_tokens // length)
        for start in range(0, len(same), count):
            yield same[start : start + count]


def _score_batch(
    model: Gemma, batch: list[_Question], batch_tokens: int
) -> dict[tuple[Ids, Ids], TokenScores]:
    """Scores by context and continuation."""
    length = min(bucket(max(one.length for one in batch)), model.cfg.max_positions)
    beginnings = [one.beginning for one in batch]
    count, common = power_of_two(len(batch)), _in_common(beginnings)
    if common >= SHARED:
        cache = _read(model, empty_cache(model, 1, length), [beginnings[0][:common]], 0)
        cache = _copies(cache, jnp.zeros(count, jnp.int32))
    else:
        common, cache = 0, empty_cache(model, count, length)
    cache = _read(model, cache, [ids[common:] for ids in beginnings], common)
    rows = [(i, row) for i, one in enumerate(batch) for row in one.rows]
    width = max(len(row.ids) for _, row in rows)
    most = _floor_power(min(batch_tokens // min(width, CHUNK), 4 * batch_tokens // length))
    found: dict[tuple[Ids, Ids], TokenScores] = {}
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        scores = _score_rows(model, cache, beginnings, part)
        for (i, row), (log_probs, greedy) in zip(part, scores, strict=True):
            context, inside = (*beginnings[i], row.ids[0]), len(row.ids) - 1
            for end, token in enumerate(row.ends, start=inside):
                places = [*range(inside), end]
                found[context, (*row.ids[1:], token)] = TokenScores(
                    log_probs[places], greedy[places]
                )
    return found


def _score_rows(
    model: Gemma, cache: Cache, beginnings: list[Ids], rows: list[tuple[int, _Row]]
) -> list[TokenScores]:
    """Scores of what follows each token of the rows, and of all that may come at their ends.

    Args:
      cache: Of the beginnings, which stays as it is.
      rows: Number of the beginning, and what comes behind it.
    """
    targets = [(*row.ids[1:], *row.ends) for _, row in rows]
    row_of = np.repeat(np.arange(len(rows)), [len(one) for one in targets])
    place_of = np.concatenate(
        [np.minimum(np.arange(len(t)), len(row.ids) - 1) for (_, row), t in zip(rows, targets)]
    )
    target_of = np.concatenate(targets)
    chosen = [i for i, _ in rows] + [0] * (power_of_two(len(rows)) - len(rows))
    cache = _copies(cache, jnp.asarray(chosen, jnp.int32))
    longest = max(len(row.ids) for _, row in rows)
    width = min(power_of_two(longest), CHUNK)
    log_probs, greedy = np.zeros(len(row_of), np.float32), np.zeros(len(row_of), bool)
    for first in range(0, longest, width):
        pieces = [row.ids[first : first + width] for _, row in rows]
        starts = [len(beginnings[i]) + first for i, _ in rows]
        here = np.flatnonzero((place_of >= first) & (place_of < first + width))
        looked_at = np.zeros((3, max(16, power_of_two(len(here)))), np.int32)
        looked_at[2] = -1
        looked_at[:, : len(here)] = row_of[here], place_of[here] - first, target_of[here]
        batch = Batch.padded(pieces, width, count=len(chosen), starts=starts)
        logs, best, cache = _judge(model, cache, batch, *looked_at)
        log_probs[here], greedy[here] = logs[: len(here)], best[: len(here)]
    cuts = np.cumsum([len(one) for one in targets])[:-1]
    return [TokenScores(*one) for one in zip(np.split(log_probs, cuts), np.split(greedy, cuts))]


def _read(model: Gemma, cache: Cache, pieces: list[Ids], start: int) -> Cache:
    """The cache with the pieces in its first rows, which hold `start` tokens before."""
    longest, count = max(map(len, pieces)), len(next(iter(cache.positions.values())))
    width = min(bucket(longest), CHUNK)
    for first in range(0, longest, width):
        parts = [piece[first : first + width] for piece in pieces]
        starts = [start + first] * len(parts)
        cache = _advance(model, cache, Batch.padded(parts, width, count=count, starts=starts))
    return cache


@jax.jit
def _copies(cache: Cache, row_B: jax.Array) -> Cache:
    """A cache whose rows are copies of these rows."""
    return cache.by_rows(lambda array, axis: jnp.take(array, row_B, axis=axis))


@partial(jax.jit, donate_argnames=("cache",))
def _advance(model: Gemma, cache: Cache, batch: Batch) -> Cache:
    return forward(model, batch, cache=cache, logits="none").cache


@partial(jax.jit, donate_argnames=("cache",))
def _judge(
    model: Gemma,
    cache: Cache,
    batch: Batch,
    rows: jax.Array,
    places: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Log-probability of each target at its place of its row, whether it is the best, the cache."""
    out = forward(model, batch, cache=cache, logits="none", capture=("final_norm",))
    x_BTD = out.captured["final_norm"][rows, places][None]
    losses_BT, best_BT = model.embed.cross_entropy(
        x_BTD, targets[None], soft_cap=model.soft_cap, return_best=True
    )
    return -losses_BT[0], best_BT[0], out.cache


def _in_common(rows: list[Ids]) -> int:
    """Tokens that all rows begin with; none for a single row, which shares with no one."""
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)  # all others begin as much alike
    pairs = enumerate(zip(first, last))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def _floor_power(n: int) -> int:
    """`n` rounded down to 1, 2, 4, 8, ..., 1 at least."""
    return 1 << (max(n, 1).bit_length() - 1)
