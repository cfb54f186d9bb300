"""The compiled loop that adds tokens to a cache.

`advance` is the one compiled program: it reads a chunk of prompt and then runs the token loop,
all inside one `jax.jit`. It is compiled once per bucket of shapes (see `prefill.py`; the number of
new tokens and the length of the cache have the same buckets as the tokens of a pass) and batch
size.

Every row goes its own way: it has its own number of tokens, limit, sampling values, stop ids and
seed, and may be emptied and given another text while the rows beside it go on. What it says does
not depend on them. All of this is plain input; only switching a sampling rule on or off for the
whole batch compiles again.

Local letters: X tokens chosen (in `tokens_BX`), or drafted (in `drafts_BX`); I stop ids; U best
tokens at a place.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache, LayerCache, init_cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.logits_processors import (
    LogitsProcessor,
    process,
    process_drafts,
    put_behind,
    put_prompt,
)
from gemma_jax.inference.prefill import PrefillChunk
from gemma_jax.inference.sampling import SamplingRows, penalised, sample
from gemma_jax.inference.verification import agree, penalised_drafts, verify
from gemma_jax.nn.layer_groups import LayerGroup
from gemma_jax.sharding import Partition

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the loop carries.

    Attributes:
      cache: Holds every token but the last one chosen.
      last_B: The last token chosen, not yet in the cache.
      step_B: Number of tokens chosen after the row's last prompt.
      limit_B: How many to choose; drafts may bring a few more.
      done_B: Rows that have met a stop id, were stopped, or are empty.
      keys_B: One random key per row; a token's draw depends on the key and its position alone.
      sampling: How to choose tokens.
      stop_ids_BI: Tokens that end a row, padded with -1.
      tokens_BX, log_probs_BX: Tokens chosen after the row's last prompt and their log-probabilities
        under the model, before any sampling rule; -1 and 0 after the end of a row.
      seen_BV: Tokens met so far, for the repetition penalty; `None` if no row has one.
      drafts: What `Propose` keeps from pass to pass; `None` without it.
      text_BS: int32, the token at each position, prompt included, -1 where there is none; `None`
        without logits processors.
      counts_BV: int32, how often each token was chosen, for penalties on that; `None` if no row
        has one.
      best_ids_BXU, best_log_probs_BXU: The most probable tokens beside each that was chosen, best
        first; `None` where nobody asks for them.
    """

    cache: Cache
    last_B: jax.Array
    step_B: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    keys_B: jax.Array
    sampling: SamplingRows
    stop_ids_BI: jax.Array
    tokens_BX: jax.Array
    log_probs_BX: jax.Array
    seen_BV: jax.Array | None = None
    drafts: Any = None
    text_BS: jax.Array | None = None
    counts_BV: jax.Array | None = None
    best_ids_BXU: jax.Array | None = None
    best_log_probs_BXU: jax.Array | None = None

    @property
    def active_B(self) -> jax.Array:
        """Rows that are to choose a token."""
        return ~self.done_B & (self.step_B < self.limit_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """Drafts of one pass.

    Attributes:
      drafts_BX: int32.
      log_q_BXV: Log-probabilities that they were drawn from; `None`: each is kept where the model's
        own draw is the same, so that the text is the model's whatever the drafts were.
      cache: The model's cache for the pass that checks them; without the drafts, whose keys and
        values may already stand in it.
      drafts: For `Propose.settle`.
      count_B: How many drafts of a row there are; `None`: all.
    """

    drafts_BX: jax.Array
    log_q_BXV: jax.Array | None
    cache: Cache
    drafts: Any
    count_B: jax.Array | None = None


class Propose(Protocol):
    """Drafts the next tokens of every row, for the model to check in one pass; a pytree.

    `count` is the number of drafts, the `slack` that the cache needs. What it keeps in
    `State.drafts` is a pytree with methods `cleared` and `rewound`, as those of `Cache`.
    """

    @property
    def count(self) -> int: ...

    def start(self, batch: int, max_len: int) -> Any:
        """`State.drafts` of empty rows."""
        ...

    def prefill(self, drafts: Any, prompt: PrefillChunk) -> Any:
        """`State.drafts` after a chunk of prompt."""
        ...

    def __call__(self, state: State, active_B: jax.Array) -> Proposal:
        """Drafts for the active rows."""
        ...

    def settle(self, proposal: Proposal, state: State, kept_B: jax.Array, new_B: jax.Array) -> Any:
        """`State.drafts` after the check, of which `state` is the outcome.

        Args:
          kept_B: Drafts that the check kept.
          new_B: Tokens that came of it, up to `kept + 1`: a stop id is the last one.
        """
        ...


class Allow(Protocol):
    """Says which tokens are legal; a pytree."""

    def __call__(self, state: State, drafts_BX: jax.Array) -> jax.Array:
        """bool `[B, X + 1, V]`: for each draft in its place, and for the token after them.

        `state` holds everything before the drafts; there are none (X = 0) without `Propose`.
        """
        ...


@partial(jax.jit, static_argnames=("loop",), donate_argnames=("state",))
def advance(
    model: Gemma,
    state: State,
    prompt: PrefillChunk | None,
    *,
    loop: bool,
    propose: Propose | None = None,
    first: Propose | None = None,
    allow: Allow | None = None,
    processors: tuple[LogitsProcessor, ...] = (),
) -> State:
    """Reads a chunk of prompt, then chooses tokens until every row meets its limit or its end.

    Args:
      prompt: A chunk; rows that end in it have their first token chosen. `None` goes straight to
        the loop.
      loop: Whether to run the token loop at all.
      propose: Speculation.
      first: Speculation in the first pass of the loop alone, by drafts of the host for example.
      allow: Constrains what may be chosen. It may depend on no more than what it is given: where
        the host works out what is legal, one call must choose one token.
      processors: Change logits, see `LogitsProcessor`; pytrees. What `allow` forbids stays so.
    """
    partition = model.runtime.partition
    if prompt is not None:
        state = constrained(_prefill(model, state, prompt, propose, allow, processors), partition)
    if not loop:
        return state
    if first is not None:
        state = constrained(_decode(model, state, first, allow, processors), partition)

    like = state

    def body(packed: State) -> State:
        state = _shaped(packed, like)
        return _packed(constrained(_decode(model, state, propose, allow, processors), partition))

    packed = jax.lax.while_loop(lambda s: jnp.any(s.active_B), body, _packed(state))
    return constrained(_unpacked(packed, like), partition)


def _packed(state: State) -> State:
    """With all caches in it, those of drafts too, as a loop carries them."""

    def pack(node):
        return node.packed() if isinstance(node, LayerCache) else node

    return jax.tree.map(pack, state, is_leaf=lambda node: isinstance(node, LayerCache))


def _shaped(state: State, like: State) -> State:
    return jax.tree.map(lambda a, b: a if a.shape == b.shape else a.reshape(b.shape), state, like)


def _unpacked(packed: State, like: State) -> State:
    """Behind the loop. XLA's CPU backend gives what is reshaped to have an axis of size 1 behind
    others another layout than a program's results have, and copies it, twice. Not where something
    is written to it, so a few numbers are written to where they stand."""

    def unpack(a: jax.Array, b: jax.Array) -> jax.Array:
        if a.shape == b.shape:
            return a
        long = next(i for i, n in enumerate(b.shape) if n > 1)
        a = a.reshape(b.shape)
        if 1 not in b.shape[long:]:
            return a
        at = tuple(jnp.arange(n) if i == long else 0 for i, n in enumerate(b.shape[:4]))
        return a.at[at].set(a[at])

    return jax.tree.map(unpack, packed, like)


def constrained(tree: Tree, partition: Partition | None) -> Tree:
    """On a mesh: caches by their letters, all else on every device, for the host to read."""
    return tree if partition is None else partition.constrain(tree)


def _prefill(
    model: Gemma,
    state: State,
    prompt: PrefillChunk,
    propose: Propose | None,
    allow: Allow | None,
    processors: tuple[LogitsProcessor, ...],
) -> State:
    """Reads the chunk and chooses the first token of the rows that end in it."""
    wanted = "none" if prompt.ends_B is None else "last"
    out = forward(model, prompt.batch, cache=state.cache, logits=wanted)
    real_BT = jnp.where(prompt.batch.positions_BT >= 0, prompt.batch.tokens_BT, -1)
    state = replace(
        state,
        cache=out.cache,
        seen_BV=_mark_seen(state.seen_BV, real_BT),
        drafts=state.drafts if propose is None else propose.prefill(state.drafts, prompt),
        text_BS=put_prompt(state.text_BS, prompt.batch.tokens_BT, prompt.batch.positions_BT),
    )
    if prompt.ends_B is None:
        return state
    ends_B1 = prompt.ends_B[:, None]
    state = replace(
        state,
        step_B=jnp.where(prompt.ends_B, 0, state.step_B),
        done_B=state.done_B & ~prompt.ends_B,
        tokens_BX=jnp.where(ends_B1, -1, state.tokens_BX),
        log_probs_BX=jnp.where(ends_B1, 0, state.log_probs_BX),
    )
    chosen_BT = choose(state, out.logits, out.cache.length_B, allow, processors)
    return append(state, chosen_BT, jnp.where(prompt.ends_B, 1, 0), out.logits)


def _decode(
    model: Gemma,
    state: State,
    propose: Propose | None,
    allow: Allow | None,
    processors: tuple[LogitsProcessor, ...],
) -> State:
    """Feeds the last token of every active row to the model and chooses the next, or several."""
    active_B, start_B = state.active_B, state.cache.length_B
    if propose is None:
        position_BT = jnp.where(active_B, start_B, -1)[:, None]
        out = forward(
            model, Batch(state.last_B[:, None], position_BT), cache=state.cache, logits="last"
        )
        chosen_BT = choose(state, out.logits, start_B + 1, allow, processors)
        state = replace(state, cache=out.cache)
        return append(state, chosen_BT, jnp.where(active_B, 1, 0), out.logits)

    proposal = propose(state, active_B)
    read_BT = jnp.concatenate([state.last_B[:, None], proposal.drafts_BX], axis=1)
    position_BT = start_B[:, None] + jnp.arange(read_BT.shape[1])
    within_BT = active_B[:, None]
    if proposal.count_B is not None:
        within_BT = within_BT & (jnp.arange(read_BT.shape[1]) <= proposal.count_B[:, None])
    out = forward(
        model, Batch(read_BT, jnp.where(within_BT, position_BT, -1)), cache=proposal.cache
    )
    chosen_BT, kept_B = _check(state, proposal, out.logits, start_B, allow, processors)
    kept_B, before_B = jnp.where(active_B, kept_B, 0), state.step_B
    state = append(state, chosen_BT, jnp.where(active_B, kept_B + 1, 0), out.logits)
    new_B = state.step_B - before_B
    state = replace(state, cache=out.cache.rewound(start_B + new_B))
    return replace(state, drafts=propose.settle(proposal, state, kept_B, new_B))


def _check(
    state: State,
    proposal: Proposal,
    logits_BTV: jax.Array,
    start_B: jax.Array,
    allow: Allow | None,
    processors: tuple[LogitsProcessor, ...],
) -> tuple[jax.Array, jax.Array]:
    """Tokens `[B, X + 1]`, of which the first `kept + 1` are chosen, and `kept_B`."""
    drafts_BX = proposal.drafts_BX
    logits_BTV = penalised_drafts(
        logits_BTV, drafts_BX, state.seen_BV, state.sampling, state.counts_BV
    )
    logits_BTV = process_drafts(processors, logits_BTV, state.text_BS, drafts_BX)
    logits_BTV = _legal(allow, state, drafts_BX, logits_BTV)
    if proposal.log_q_BXV is not None:
        return verify(
            logits_BTV, drafts_BX, proposal.log_q_BXV, state.keys_B, start_B, state.sampling
        )
    return agree(logits_BTV, drafts_BX, proposal.count_B, state.keys_B, start_B, state.sampling)


def choose(
    state: State,
    logits_BTV: jax.Array,
    position_B: jax.Array,
    allow: Allow | None,
    processors: tuple[LogitsProcessor, ...],
) -> jax.Array:
    """One token per row for `position`, `[B, 1]`."""
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, position_B)
    none_BX = jnp.zeros((len(keys_B), 0), jnp.int32)
    logits_BV = penalised(logits_BTV[:, 0], state.seen_BV, state.sampling, state.counts_BV)
    logits_BV = process(processors, logits_BV, state.text_BS)
    if allow is not None:
        logits_BV = _legal(allow, state, none_BX, logits_BV[:, None])[:, 0]
    return sample(logits_BV, keys_B, state.sampling)[:, None]


def _legal(
    allow: Allow | None, state: State, drafts_BX: jax.Array, logits_BTV: jax.Array
) -> jax.Array:
    if allow is None:
        return logits_BTV
    return jnp.where(allow(state, drafts_BX), logits_BTV, -jnp.inf)


def append(state: State, chosen_BT: jax.Array, count_B: jax.Array, logits_BTV: jax.Array) -> State:
    """Puts the first `count` tokens behind those of each row; a stop id is the last one."""
    T = chosen_BT.shape[1]
    stop_BT = jnp.any(chosen_BT[:, :, None] == state.stop_ids_BI[:, None], axis=-1)
    until_B = jnp.where(stop_BT.any(axis=1), jnp.argmax(stop_BT, axis=1) + 1, T)
    count_B = jnp.minimum(count_B, until_B)
    within_BT = jnp.arange(T) < count_B[:, None]
    # In two dimensions: XLA's CPU backend is slower with three.
    logits_XV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    log_probs_X = jnp.take_along_axis(logits_XV, chosen_BT.reshape(-1, 1), axis=1)[:, 0]
    total_X = jax.nn.logsumexp(logits_XV, axis=1)
    log_probs_BT = (log_probs_X - total_X).reshape(chosen_BT.shape)
    last_B = jnp.take_along_axis(chosen_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]

    index_BX = jnp.arange(state.tokens_BX.shape[1]) - state.step_B[:, None]
    new_BX = (index_BX >= 0) & (index_BX < count_B[:, None])

    def put(old: jax.Array, values: jax.Array) -> jax.Array:
        # A select, not a scatter: nothing beside the work of a token, on any device.
        behind = (1,) * (old.ndim - 2)
        at = jnp.clip(index_BX, 0, T - 1).reshape(*index_BX.shape, *behind)
        new = new_BX.reshape(*new_BX.shape, *behind)
        return jnp.where(new, jnp.take_along_axis(values, at, axis=1), old)

    new_BT = jnp.where(within_BT, chosen_BT, -1)
    state = replace(
        state,
        last_B=jnp.where(count_B > 0, last_B, state.last_B),
        step_B=state.step_B + count_B,
        done_B=state.done_B | (stop_BT & within_BT).any(axis=1),
        tokens_BX=put(state.tokens_BX, chosen_BT),
        log_probs_BX=put(state.log_probs_BX, log_probs_BT),
        seen_BV=_mark_seen(state.seen_BV, new_BT),
        text_BS=put_behind(state.text_BS, chosen_BT, within_BT),
        counts_BV=_count(state.counts_BV, new_BT),
    )
    if state.best_ids_BXU is None:
        return state
    best_XU, ids_XU = jax.lax.top_k(logits_XV, state.best_ids_BXU.shape[2])
    shape = (*chosen_BT.shape, -1)
    return replace(
        state,
        best_ids_BXU=put(state.best_ids_BXU, ids_XU.reshape(shape)),
        best_log_probs_BXU=put(
            state.best_log_probs_BXU, (best_XU - total_X[:, None]).reshape(shape)
        ),
    )


def _mark_seen(seen_BV: jax.Array | None, tokens_BT: jax.Array) -> jax.Array | None:
    """Marks the tokens of each row; ids below 0 mark nothing."""
    if seen_BV is None:
        return None
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    ids_BT = jnp.where(tokens_BT >= 0, tokens_BT, seen_BV.shape[1])
    return seen_BV.at[rows_B1, ids_BT].set(True, mode="drop")


def _count(counts_BV: jax.Array | None, tokens_BT: jax.Array) -> jax.Array | None:
    """Adds the tokens of each row; ids below 0 add nothing."""
    if counts_BV is None:
        return None
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    ids_BT = jnp.where(tokens_BT >= 0, tokens_BT, counts_BV.shape[1])
    return counts_BV.at[rows_B1, ids_BT].add(1, mode="drop")


@partial(
    jax.jit,
    static_argnames=(
        "cfg", "layer_groups", "max_len", "dtype", "new_tokens", "slack", "partition",
    ),
)  # fmt: skip
def empty_state(
    seed_B: jax.Array,
    sampling: SamplingRows,
    stop_ids_BI: jax.Array,
    *,
    cfg: GemmaConfig,
    layer_groups: tuple[LayerGroup, ...],
    max_len: int,
    dtype: jnp.dtype,
    new_tokens: int = 0,
    slack: int = 0,
    partition: Partition | None = None,
) -> State:
    """Rows with nothing in them, which wait for a prompt.

    One program rather than one per array: most of a small model's start was these.

    Args:
      seed_B: uint32.
      max_len: Longest row in tokens.
      dtype: Of keys and values.
      new_tokens: Columns of `tokens_BX`.
      slack: See `Cache`.
    """
    batch = len(seed_B)
    state = State(
        cache=init_cache(cfg, layer_groups, batch, max_len, dtype, slack),
        last_B=jnp.zeros(batch, jnp.int32),
        step_B=jnp.zeros(batch, jnp.int32),
        limit_B=jnp.zeros(batch, jnp.int32),
        done_B=jnp.ones(batch, bool),
        keys_B=jax.vmap(jax.random.key)(seed_B),
        sampling=sampling,
        stop_ids_BI=stop_ids_BI,
        tokens_BX=jnp.full((batch, new_tokens), -1, jnp.int32),
        log_probs_BX=jnp.zeros((batch, new_tokens), jnp.float32),
        seen_BV=jnp.zeros((batch, cfg.vocab_size), bool) if sampling.penalty else None,
        counts_BV=jnp.zeros((batch, cfg.vocab_size), jnp.int32) if sampling.counts else None,
    )
    return constrained(state, partition)
