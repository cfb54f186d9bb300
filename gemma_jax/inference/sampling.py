"""Choosing the next token from logits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import power_of_two
from gemma_jax.field_types import named_fields
from gemma_kernels.platform import target_platform

# Beyond these, float32 no longer tells logits apart: divided by less they overflow, divided by more
# they all become zero, and the first tokens of the vocabulary would win.
SMALLEST, LARGEST = 1e-20, 1e20

# Of a large vocabulary so many tokens nearly always hold what top-p keeps, and cost a hundredth of
# sorting it.
FEW = 1024


@named_fields
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how to choose tokens: greedily by default. Raises `ValueError` for impossible values.

    Applied in the order of transformers' logits processors: repetition penalty, those on what was
    chosen, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: Logits are divided by it; 0 takes the most probable token, and so does anything
        below 1e-20.
      top_k: Keep the `k` most probable tokens; 0 keeps all.
      top_p: Keep the fewest tokens whose probabilities sum to at least `top_p`.
      min_p: Keep tokens at least `min_p` times as probable as the most probable one.
      repetition_penalty: Logits of tokens seen so far (prompt included) are divided by it if
        positive, multiplied if negative.
      presence_penalty, frequency_penalty: Taken off the logits of tokens chosen so far (those of
        the prompt do not count): the first one once, the second one as often as they were chosen.
        As in OpenAI's API, between -2 and 2.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Sampling(temperature=0.7, top_k=64, top_p=0.95).top_k
      64
      >>> gj.Sampling(top_p=2)
      Traceback (most recent call last):
      ValueError: top_p=2 must be above 0 and at most 1
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        checks = {
            "temperature": (0 <= self.temperature <= LARGEST, f"between 0 and {LARGEST:g}"),
            "top_k": (self.top_k >= 0 and self.top_k % 1 == 0, "an integer, 0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                SMALLEST <= self.repetition_penalty <= LARGEST,
                f"between {SMALLEST:g} and {LARGEST:g}",
            ),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")
        object.__setattr__(self, "top_k", int(self.top_k))  # JSON may say 64.0

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token was chosen."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < SMALLEST


Among = Literal["none", "some", "all"]  # rows of a batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """`Sampling` of every row of a batch: values as arrays, and switches that cost a compilation.

    The switches only leave out work that no row asks for. What a row draws depends on its own
    values and key alone: random numbers belong to a token's place among the candidates, and are
    the same however many candidates there are.

    Attributes:
      temperature_B, top_p_B, min_p_B: float32; 1 for a greedy row's temperature.
      repetition_penalty_B, presence_penalty_B, frequency_penalty_B: float32.
      top_k_B: int32; the vocabulary's size where all tokens are kept.
      greedy_B, sorted_B: bool; rows that take the best token, and those that need the candidates in
        descending order (for top-k or top-p).
      greedy, sorted: Whether all, some or no rows do.
      candidates: How many of the sorted candidates are kept for the rules.
      top_p, min_p, penalty, counts: Whether any row uses the rule; the last one is for penalties on
        what was chosen.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_penalty_B: jax.Array
    presence_penalty_B: jax.Array
    frequency_penalty_B: jax.Array
    greedy_B: jax.Array
    sorted_B: jax.Array
    greedy: Among = field(metadata={"static": True})
    sorted: Among = field(metadata={"static": True})
    candidates: int = field(metadata={"static": True})
    top_p: bool = field(metadata={"static": True})
    min_p: bool = field(metadata={"static": True})
    penalty: bool = field(metadata={"static": True})
    counts: bool = field(metadata={"static": True})

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocab_size: int) -> "SamplingRows":
        """The rules of each row, for a vocabulary of this size.

        Examples:
          >>> rows = SamplingRows.of([Sampling(), Sampling(temperature=1.0, top_k=5)], 100)
          >>> rows.greedy, rows.candidates, rows.top_k_B.tolist()
          ('some', 8, [100, 5])
        """
        sampled = [row for row in rows if not row.greedy]
        sorts = [not row.greedy and (row.top_k > 0 or row.top_p < 1) for row in rows]
        top_ks = [min(row.top_k or vocab_size, vocab_size) for row in rows]
        widest = max([k for k, sorted_ in zip(top_ks, sorts) if sorted_], default=0)
        return cls(
            temperature_B=_floats(1 if row.greedy else row.temperature for row in rows),
            top_k_B=np.array(top_ks, np.int32),
            top_p_B=_floats(max(row.top_p, SMALLEST) for row in rows),
            min_p_B=_floats(row.min_p for row in rows),
            repetition_penalty_B=_floats(row.repetition_penalty for row in rows),
            presence_penalty_B=_floats(row.presence_penalty for row in rows),
            frequency_penalty_B=_floats(row.frequency_penalty for row in rows),
            greedy_B=np.array([row.greedy for row in rows]),
            sorted_B=np.array(sorts),
            greedy=_among(len(rows) - len(sampled), len(rows)),
            sorted=_among(sum(sorts), len(sampled)),
            # The next power of two: a program serves all top-k up to it.
            candidates=min(power_of_two(widest), vocab_size) if widest else 0,
            top_p=any(row.top_p < 1 for row in sampled),
            min_p=any(row.min_p > 0 for row in sampled),
            penalty=any(row.repetition_penalty != 1 for row in rows),
            counts=any(row.counts for row in rows),
        )


def _floats(values: Iterable[float]) -> np.ndarray:
    return np.array([float(value) for value in values], np.float32)


def _among(count: int, all_rows: int) -> Among:
    return "none" if count == 0 else "all" if count == all_rows else "some"


def penalised(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    rows: SamplingRows,
    counts_BV: jax.Array | None = None,
) -> jax.Array:
    """Logits after the penalties, the first of the rules.

    Args:
      seen_BV: bool, tokens met so far; `None` if no row has a repetition penalty.
      counts_BV: int32, how often each was chosen; `None` if no row has a penalty on that.
    """
    if rows.penalty:
        penalty_B1 = rows.repetition_penalty_B[:, None]
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if rows.counts:
        logits_BV = logits_BV - rows.presence_penalty_B[:, None] * (counts_BV > 0)
        logits_BV = logits_BV - rows.frequency_penalty_B[:, None] * counts_BV
    return logits_BV


def sample(logits_BV: jax.Array, keys_B: jax.Array, rows: SamplingRows) -> jax.Array:
    """Chooses one token id per row by all rules but the penalties, int32 `[B]`.

    Args:
      logits_BV: float32; -inf for tokens that are not to be chosen.
      keys_B: A random key per row.
    """
    if rows.greedy == "all":
        return best(logits_BV)
    draw = jax.vmap(_draw)
    if rows.candidates > FEW:
        few = replace(rows, candidates=FEW)
        # For the batch as a whole: what differs from row to row would be computed both ways.
        drawn_B = jax.lax.cond(
            jnp.all(jax.vmap(_few_hold_all)(logits_BV, few)),
            lambda: draw(logits_BV, keys_B, few),
            lambda: draw(logits_BV, keys_B, rows),
        )
    else:
        drawn_B = draw(logits_BV, keys_B, rows)
    if rows.greedy == "none":
        return drawn_B
    return jnp.where(rows.greedy_B, best(logits_BV), drawn_B)


def distribution(logits_BTV: jax.Array, rows: SamplingRows) -> jax.Array:
    """Log-probabilities that `sample` draws from, `[B, T, V]`; -inf for what the rules leave out.

    The penalties are not among them. All of a greedy row's probability is at its best
    token.
    """

    def one(logits_V: jax.Array, row: SamplingRows) -> jax.Array:
        lowest_V = jnp.full_like(logits_V, -jnp.inf)
        log_p_V = lowest_V
        if row.greedy != "all":
            by_order = _by_order(logits_V / row.temperature_B, row)
            log_p_V = _where_sorted(
                row, *(jax.nn.log_softmax(lowest_V.at[ids].set(kept)) for kept, ids in by_order)
            )
        if row.greedy == "none":
            return log_p_V
        return jnp.where(row.greedy_B, lowest_V.at[best(logits_V)].set(0), log_p_V)

    return jax.vmap(jax.vmap(one, in_axes=(0, None)))(logits_BTV, rows)


def best(logits: jax.Array) -> jax.Array:
    """The token with the largest logit, the first of equal ones, int32 `[...]`."""
    if target_platform() != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA's CPU backend has no vector instructions for argmax, but has them for both of these: of
    # 262,144 tokens 0.2 ms instead of 1.2, a tenth of a small model's step.
    below = logits < jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(below, logits.shape[-1], ids), axis=-1).astype(jnp.int32)


def _draw(logits_V: jax.Array, key: jax.Array, row: SamplingRows) -> jax.Array:
    by_order = _by_order(logits_V / row.temperature_B, row)
    drawn = [ids[jax.random.categorical(key, kept)].astype(jnp.int32) for kept, ids in by_order]
    return _where_sorted(row, *drawn)


def _few_hold_all(logits_V: jax.Array, row: SamplingRows) -> jax.Array:
    """Whether the row's rules keep none but its first candidates."""
    logits_V = logits_V / row.temperature_B
    top, _ = jax.lax.top_k(logits_V, row.candidates)
    held = jnp.sum(jnp.exp(top - jax.nn.logsumexp(logits_V)))
    cut = (row.top_k_B >= logits_V.size) & (held > row.top_p_B + 1e-4)  # whatever sums round to
    return row.greedy_B | ~row.sorted_B | (row.top_k_B <= row.candidates) | cut


def _by_order(logits_V: jax.Array, row: SamplingRows) -> list[tuple[jax.Array, jax.Array]]:
    """Logits after the rules and the tokens they belong to: sorted, if any row needs them so, then
    in the vocabulary's order, if any does not."""
    orders = []
    if row.sorted != "none":
        total = jax.nn.logsumexp(logits_V) if row.top_p else jnp.zeros(())
        everything = jnp.where(row.top_k_B >= logits_V.size, total, -jnp.inf)
        orders.append(_top(*jax.lax.top_k(logits_V, row.candidates), everything, row))
    if row.sorted != "all":
        orders.append((_likely(logits_V, row), jnp.arange(logits_V.size, dtype=jnp.int32)))
    return orders


def _where_sorted(row: SamplingRows, first: jax.Array, *second: jax.Array) -> jax.Array:
    return jnp.where(row.sorted_B, first, second[0]) if second else first


def _top(
    logits: jax.Array, candidates: jax.Array, total: jax.Array, row: SamplingRows
) -> tuple[jax.Array, jax.Array]:
    """Top-k, top-p and min-p of candidates in descending order; `total` is the log-sum-exp of the
    vocabulary for a row whose top-k keeps it all, else -inf."""
    logits = jnp.where(jnp.arange(logits.size) < row.top_k_B, logits, -jnp.inf)
    if row.top_p:
        probs = jnp.exp(logits - jnp.where(total > -jnp.inf, total, jax.nn.logsumexp(logits)))
        before = jnp.cumsum(probs) - probs
        # Sums of all probabilities may be rounded to 1 before the last of them.
        logits = jnp.where((before < row.top_p_B) | (row.top_p_B >= 1), logits, -jnp.inf)
    return _likely(logits, row), candidates


def _likely(logits: jax.Array, row: SamplingRows) -> jax.Array:
    """Min-p."""
    if not row.min_p:
        return logits
    return jnp.where(logits >= jnp.max(logits) + jnp.log(row.min_p_B), logits, -jnp.inf)
