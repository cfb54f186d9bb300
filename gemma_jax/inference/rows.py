"""Rows of a `State` that come and go: emptied, taken back, put in from elsewhere, left out."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.decode import (
    Allow,
    Propose,
    State,
    advance,
    constrained,
    empty_state,
)
from gemma_jax.inference.logits_processors import LogitsProcessor
from gemma_jax.inference.sampling import SamplingRows
from gemma_jax.sharding import Partition


def empty_rows(
    model: Gemma,
    sampling: SamplingRows,
    *,
    max_len: int,
    new_tokens: int = 0,
    slack: int = 0,
    stops: int = 1,
) -> State:
    """Rows of a model with nothing in them, as many as `sampling` has.

    Args:
      max_len, new_tokens, slack: As for `empty_state`.
      stops: Most stop ids of a row.
    """
    batch, runtime = len(sampling.temperature_B), model.runtime
    return empty_state(
        np.zeros(batch, np.uint32),
        sampling,
        np.full((batch, stops), -1, np.int32),
        cfg=model.cfg,
        layer_groups=model.layer_groups,
        max_len=max_len,
        dtype=runtime.kv_dtype,
        new_tokens=new_tokens,
        slack=slack,
        partition=runtime.partition,
    )


@partial(jax.jit, static_argnames=("partition",), donate_argnames=("state",))
def emptied(
    state: State, empty_B: jax.Array, seed_B: jax.Array, *, partition: Partition | None
) -> State:
    """The state with nothing in the rows that are `True`, which get new seeds."""
    keys_B = jax.vmap(jax.random.key)(seed_B)
    seen_BV, counts_BV = state.seen_BV, state.counts_BV
    state = replace(
        state,
        cache=state.cache.cleared(empty_B),
        step_B=jnp.where(empty_B, 0, state.step_B),
        done_B=state.done_B | empty_B,
        keys_B=jnp.where(empty_B, keys_B, state.keys_B),
        seen_BV=None if seen_BV is None else seen_BV & ~empty_B[:, None],
        drafts=None if state.drafts is None else state.drafts.cleared(empty_B),
        text_BS=None if state.text_BS is None else jnp.where(empty_B[:, None], -1, state.text_BS),
        counts_BV=None if counts_BV is None else jnp.where(empty_B[:, None], 0, counts_BV),
    )
    return constrained(state, partition)


@partial(jax.jit, static_argnames=("partition",), donate_argnames=("state",))
def rewound(state: State, length_B: jax.Array, *, partition: Partition | None) -> State:
    """The state without tokens at positions of `length` and beyond, see `Cache.rewound`."""
    drafts = None if state.drafts is None else state.drafts.rewound(length_B)
    state = replace(state, cache=state.cache.rewound(length_B), drafts=drafts)
    return constrained(state, partition)


@partial(jax.jit, static_argnames=("partition",), donate_argnames=("state",))
def inserted(
    state: State,
    cache: Cache,
    slot: jax.Array,
    last: jax.Array,
    seed: jax.Array,
    seen_V: jax.Array,
    *,
    partition: Partition | None,
) -> State:
    """The state with another text in one row, read elsewhere, which has chosen nothing yet.

    Args:
      cache: Of one row; holds all of the text but `last`.
      slot: int32; the row.
      last: int32; its last token.
      seed: uint32.
      seen_V: bool; the tokens of the text, looked at where the state keeps them.
    """
    state = replace(
        state,
        cache=state.cache.with_row(slot, cache),
        last_B=state.last_B.at[slot].set(last),
        keys_B=state.keys_B.at[slot].set(jax.random.key(seed)),
        seen_BV=None if state.seen_BV is None else state.seen_BV.at[slot].set(seen_V),
        counts_BV=None if state.counts_BV is None else state.counts_BV.at[slot].set(0),
    )
    return constrained(state, partition)


@partial(jax.jit, static_argnames=("partition",), donate_argnames=("state",))
def moved(
    state: State, source: jax.Array, target: jax.Array, *, partition: Partition | None
) -> State:
    """The state with all of one row in the place of another.

    Args:
      source, target: int32; numbers of rows.
    """

    def move(array: jax.Array, axis: int) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(array, source, 1, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(array, row, target, axis=axis)

    return constrained(_by_rows(move, state), partition)


@partial(jax.jit, static_argnames=("rows",), donate_argnames=("state",))
def advance_first(
    model: Gemma,
    state: State,
    *,
    rows: int,
    first: Propose | None = None,
    allow: Allow | None = None,
    processors: tuple[LogitsProcessor, ...] = (),
) -> State:
    """The token loop of `advance` for the first so many rows; the others stay as they are.

    What a step costs grows with its rows on CPUs, whether they have something to write or not. The
    arguments behind `rows` are those of the first rows alone.
    """
    options = dict(loop=True, first=first, allow=allow, processors=processors)
    if rows == len(state.last_B):
        return advance(model, state, None, **options)

    def cut(array: jax.Array, axis: int) -> jax.Array:
        return jax.lax.slice_in_dim(array, 0, rows, axis=axis)

    def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=axis)

    return _by_rows(put, state, advance(model, _by_rows(cut, state), None, **options))


def _by_rows(change, *states: State) -> State:
    """Applies a function to arrays and to the number of the axis that is their rows."""
    first, *others = (state.cache for state in states)
    bare = [replace(state, cache=None) for state in states]
    rest = jax.tree.map(partial(change, axis=0), *bare)
    return replace(rest, cache=first.by_rows(change, *others))
