"""The compiled loop that adds tokens to a cache.

`advance` is the one compiled program: it reads a chunk of prompt and then runs the token loop,
all inside one `jax.jit`. It is compiled once per bucket of shapes (see `prefill.py`; the number of
new tokens and the length of the cache have the same buckets as the tokens of a pass), batch size
and top-k.

Temperature, top-p, min-p, the penalty and seeds are plain inputs; only switching one of them on
or off compiles again.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache, init_cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.prefill import Pass
from gemma_jax.inference.sampling import SamplingProgram, sample
from gemma_jax.nn.layer_groups import LayerGroup
from gemma_jax.sharding import Partition

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the loop carries.

    Attributes:
      cache: Holds every token but the last one chosen.
      last_B: The last token chosen, not yet in the cache.
      keys_B: One random key per row; a token's draw depends on the key and its position alone.
      done_B: Rows that have met a stop id.
      step: Number of tokens chosen so far, the same for all rows.
      tokens_BX, log_probs_BX: Tokens chosen and their log-probabilities under the model, before
        any sampling rule; -1 and 0 after the end of a row.
      seen_BV: Tokens met so far, for the repetition penalty; `None` without one.
    """

    cache: Cache
    last_B: jax.Array
    keys_B: jax.Array
    done_B: jax.Array
    step: jax.Array
    tokens_BX: jax.Array
    log_probs_BX: jax.Array
    seen_BV: jax.Array | None


@partial(jax.jit, static_argnames=("stop_ids", "loop"), donate_argnames=("state",))
def advance(
    model: Gemma,
    state: State,
    how: SamplingProgram,
    limit: jax.Array,
    prompt: Pass | None,
    *,
    stop_ids: tuple[int, ...],
    loop: bool,
) -> State:
    """Reads a chunk of prompt, then chooses tokens until `limit` of them or the end of all rows.

    Args:
      limit: int32 bound on `state.step`.
      prompt: A chunk; rows that end in it have their first token chosen. `None` goes straight to
        the loop.
      loop: Whether to run the token loop at all.
    """
    if prompt is not None:
        out = forward(
            model,
            Batch(prompt.tokens_BT, prompt.positions_BT, soft=prompt.soft),
            cache=state.cache,
            logits="last",
        )
        real_BT = jnp.where(prompt.positions_BT >= 0, prompt.tokens_BT, -1)
        state = replace(state, cache=out.cache, seen_BV=_mark_seen(state.seen_BV, real_BT))
        state = _choose(state, 0, out.logits[:, 0], prompt.ends_B, how, stop_ids)
        state = placed(state, model.runtime.partition)

    def body(state: State) -> State:
        position_B = jnp.where(state.done_B, -1, state.cache.length_B)
        out = forward(
            model,
            Batch(state.last_B[:, None], position_B[:, None]),
            cache=state.cache,
            logits="last",
        )
        state = replace(state, cache=out.cache)
        state = _choose(state, state.step, out.logits[:, 0], ~state.done_B, how, stop_ids)
        return placed(state, model.runtime.partition)

    if not loop:
        return state
    state = jax.lax.while_loop(lambda s: (s.step < limit) & ~jnp.all(s.done_B), body, state)
    return placed(state, model.runtime.partition)


def placed(carry: T, partition: Partition | None) -> T:
    """On a mesh: caches by their letters, all else on every device, for the host to read."""
    return carry if partition is None else partition.constrain(carry)


def _choose(
    state: State,
    step: jax.Array | int,
    logits_BV: jax.Array,
    active_B: jax.Array,
    how: SamplingProgram,
    stop_ids: tuple[int, ...],
) -> State:
    """Chooses token number `step` of the active rows."""
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.cache.length_B)
    token_B = sample(logits_BV, keys_B, state.seen_BV, how)
    log_prob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    log_prob_B -= jax.nn.logsumexp(logits_BV, axis=1)
    stopped_B = jnp.isin(token_B, jnp.array(stop_ids, jnp.int32))
    return replace(
        state,
        last_B=jnp.where(active_B, token_B, state.last_B),
        done_B=state.done_B | (active_B & stopped_B),
        step=jnp.asarray(step + 1, jnp.int32),
        tokens_BX=state.tokens_BX.at[:, step].set(
            jnp.where(active_B, token_B, state.tokens_BX[:, step])
        ),
        log_probs_BX=state.log_probs_BX.at[:, step].set(
            jnp.where(active_B, log_prob_B, state.log_probs_BX[:, step])
        ),
        seen_BV=_mark_seen(state.seen_BV, jnp.where(active_B, token_B, -1)[:, None]),
    )


def _mark_seen(seen_BV: jax.Array | None, tokens_BT: jax.Array) -> jax.Array | None:
    """Marks the tokens of each row; ids below 0 mark nothing."""
    if seen_BV is None:
        return None
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    ids_BT = jnp.where(tokens_BT >= 0, tokens_BT, seen_BV.shape[1])
    return seen_BV.at[rows_B1, ids_BT].set(True, mode="drop")


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6, 7))
def empty_state(
    seed_B: jax.Array,
    cfg: GemmaConfig,
    layer_groups: tuple[LayerGroup, ...],
    max_len: int,
    dtype: jnp.dtype,
    penalty: bool,
    slack: int,
    partition: Partition | None,
) -> State:
    """One program rather than one per array: most of a small model's start was these."""
    batch = len(seed_B)
    state = State(
        cache=init_cache(cfg, layer_groups, batch, max_len, dtype, slack),
        last_B=jnp.zeros(batch, jnp.int32),
        keys_B=jax.vmap(jax.random.key)(seed_B),
        done_B=jnp.zeros(batch, bool),
        step=jnp.int32(0),
        tokens_BX=jnp.zeros((batch, 0), jnp.int32),
        log_probs_BX=jnp.zeros((batch, 0), jnp.float32),
        seen_BV=jnp.zeros((batch, cfg.vocab_size), bool) if penalty else None,
    )
    return placed(state, partition)
