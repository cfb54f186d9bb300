"""Speculative decoding: a small model drafts, the large one checks all drafts in one pass.

The drafts that the large model would have chosen are kept, and one token of its own follows, so
that every pass yields at least one. Greedy text is the large model's; sampled text is distributed
as its (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023,
algorithm 1).

The drafts come from a slice of the model itself (`gemma_jax.matformer`), so no other weights are
needed; where the slice computes the same keys and values as the model, no other cache either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.decode import State, placed
from gemma_jax.inference.prefill import Pass
from gemma_jax.inference.sampling import Sampling, SamplingProgram, distribution
from gemma_jax.inference.session import CHUNK, Session
from gemma_jax.matformer import Slice, at, shares_cache
from gemma_jax.placement import empty_cache

DRAFT_TOKENS = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafts:
    """What the loop carries besides the model's own `State`.

    Attributes:
      cache: The draft model's, up to the token before the last one chosen; `None` where it works in
        the model's.
      proposed_B, accepted_B: How many drafts there were since the last `read`, and how many of them
        were kept.
    """

    cache: Cache | None
    proposed_B: jax.Array
    accepted_B: jax.Array


class SpeculativeSession(Session):
    """A `Session` whose `write` drafts and checks. It reads once: no turns.

    Args:
      draft: A slice of `model`, or any model with the same vocabulary.
      draft_tokens: Drafts per pass of the model.
      And those of `Session`.

    Raises:
      ValueError: Another vocabulary, no drafts, a repetition penalty (what it does to one draft
        depends on the drafts before), or as `Session` and `matformer.at`.
    """

    def __init__(
        self,
        model: Gemma,
        batch: int,
        max_len: int,
        *,
        draft: Gemma | Slice,
        draft_tokens: int = DRAFT_TOKENS,
        sampling: Sampling = Sampling(),
        seeds: int | Sequence[int] = 0,
        stop_ids: Sequence[int] = (),
        chunk: int = CHUNK,
    ):
        if draft_tokens < 1:
            raise ValueError(f"{draft_tokens=} must be at least 1")
        if sampling.repetition_penalty != 1:
            raise ValueError("speculation knows no repetition penalty; leave one of the two out")
        self.num_drafts, self._limit = draft_tokens, 0
        super().__init__(
            model, batch, max_len, sampling=sampling, seeds=seeds, stop_ids=stop_ids, chunk=chunk,
            slack=draft_tokens,
        )  # fmt: skip
        self.shared: tuple[int, ...] | None = None  # layers of a draft in the model's own cache
        if isinstance(draft, Slice):
            if shares_cache(model.cfg, draft):
                self.shared = draft.kept(len(model.cfg.layers))
            draft = at(model, draft, allow_irregular=True)
        if draft.cfg.vocab_size != model.cfg.vocab_size:
            raise ValueError(
                f"the draft model has {draft.cfg.vocab_size} tokens, the model "
                f"{model.cfg.vocab_size}; they must have the same vocabulary"
            )
        self.draft = draft
        none_B = np.zeros(batch, np.int32)
        self._drafts = Drafts(self._draft_cache(batch), none_B, none_B)

    def _draft_cache(self, batch: int) -> Cache | None:
        if self.shared is not None:
            return None
        return empty_cache(self.draft, batch, self.max_len, self.num_drafts)

    def write(self, limit: int) -> list[list[int]]:
        super().write(limit)
        # Passes may yield more; that waits for the next call.
        self._limit = limit
        self.chosen = [row[:limit] for row in self.chosen]
        self.log_probs = [row[:limit] for row in self.log_probs]
        return self.chosen

    @property
    def done(self) -> list[bool]:
        within_B = np.sum(np.asarray(self._state.tokens_BX) >= 0, axis=1) <= self._limit
        return (np.asarray(self._state.done_B) & within_B).tolist()

    @property
    def proposed(self) -> list[int]:
        """Drafts made so far, per row."""
        return np.asarray(self._drafts.proposed_B).tolist()

    @property
    def accepted(self) -> list[int]:
        """Drafts kept so far, per row."""
        return np.asarray(self._drafts.accepted_B).tolist()

    def _width(self, max_new_tokens: int) -> int:
        return super()._width(max_new_tokens + self.num_drafts)

    def _advance(self, limit: int, prompt: Pass | None, *, loop: bool) -> None:
        if prompt is not None:
            super()._advance(0, prompt, loop=False)
            if self._drafts.cache is not None:
                cache = _read(self.draft, self._drafts.cache, prompt)
                self._drafts = replace(self._drafts, cache=cache)
        if loop and limit:
            self._state, self._drafts = advance(
                self.model,
                self.draft,
                self._state,
                self._drafts,
                self.how,
                np.int32(limit),
                stop_ids=self.stop_ids,
                num_drafts=self.num_drafts,
                shared=self.shared,
            )


@partial(jax.jit, donate_argnames=("cache",))
def _read(draft: Gemma, cache: Cache, prompt: Pass) -> Cache:
    return forward(
        draft,
        Batch(prompt.tokens_BT, prompt.positions_BT, soft=prompt.soft),
        cache=cache,
        logits="none",
    ).cache


@partial(
    jax.jit,
    static_argnames=("stop_ids", "num_drafts", "shared"),
    donate_argnames=("state", "drafts"),
)
def advance(
    model: Gemma,
    draft: Gemma,
    state: State,
    drafts: Drafts,
    how: SamplingProgram,
    limit: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    num_drafts: int,
    shared: tuple[int, ...] | None,
) -> tuple[State, Drafts]:
    """Drafts and checks until every row has `limit` tokens, or more, or has met a stop id."""

    def open_B(state: State) -> jax.Array:
        return ~state.done_B & (_count(state.tokens_BX) < limit)

    def body(carry: tuple[State, Drafts]) -> tuple[State, Drafts]:
        state, drafts = carry
        active_B, start_B = open_B(state), state.cache.length_B

        def at_B1(step: int | jax.Array) -> jax.Array:
            return jnp.where(active_B, start_B + step, -1)[:, None]

        def propose(carry, step):
            cache, last_B = carry
            out = forward(draft, Batch(last_B[:, None], at_B1(step)), cache=cache, logits="last")
            log_q_BV = distribution(out.logits[:, 0], how)
            keys_B = _keys(state, start_B + step, 0)
            token_B = _draw(keys_B, log_q_BV, how)
            return (out.cache, token_B), (token_B, log_q_BV)

        cache = drafts.cache if shared is None else _part_of(state.cache, shared)
        steps = jnp.arange(num_drafts)
        (cache, last_B), (token_XB, log_q_XBV) = jax.lax.scan(propose, (cache, state.last_B), steps)
        token_BX = token_XB.T
        whole = state.cache if shared is None else _put_back(state.cache, cache, shared)

        read_BT = jnp.concatenate([state.last_B[:, None], token_BX], axis=1)
        position_BT = jnp.where(
            active_B[:, None], start_B[:, None] + jnp.arange(num_drafts + 1), -1
        )
        out = forward(model, Batch(read_BT, position_BT), cache=whole)
        chosen_BT, kept_B = _check(state, start_B, out.logits, token_BX, log_q_XBV, how)
        state, new_B = _append(state, chosen_BT, kept_B + 1, out.logits, active_B, stop_ids)
        kept_B = jnp.where(active_B, kept_B, 0)
        after_B = start_B + new_B
        if shared is None:
            # Where all drafts were kept, the draft model has not read the last of them.
            behind_B = active_B & (new_B == num_drafts + 1)
            last_B1 = jnp.where(behind_B, start_B + num_drafts, -1)[:, None]

            def catch_up(cache: Cache) -> Cache:
                return forward(
                    draft, Batch(last_B[:, None], last_B1), cache=cache, logits="none"
                ).cache

            cache = jax.lax.cond(jnp.any(behind_B), catch_up, lambda cache: cache, cache)
            cache = cache.rewound(after_B)
        return (
            replace(state, cache=out.cache.rewound(after_B)),
            Drafts(
                cache=cache if shared is None else None,
                proposed_B=drafts.proposed_B + jnp.where(active_B, num_drafts, 0),
                accepted_B=drafts.accepted_B + kept_B,
            ),
        )

    state, drafts = jax.lax.while_loop(lambda c: jnp.any(open_B(c[0])), body, (state, drafts))
    return placed((replace(state, step=limit), drafts), model.runtime.partition)


def _check(
    state: State,
    start_B: jax.Array,
    logits_BTV: jax.Array,
    token_BX: jax.Array,
    log_q_XBV: jax.Array,
    how: SamplingProgram,
) -> tuple[jax.Array, jax.Array]:
    """`[B, T]` tokens of which the first `kept + 1` are right, and how many drafts are kept."""
    X = token_BX.shape[1]
    if how.greedy:
        best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        return best_BT, _leading(token_BX == best_BT[:, :X])
    log_p_BTV = distribution(logits_BTV, how)
    log_q_BXV = jnp.moveaxis(log_q_XBV, 0, 1)

    def of_draft(log_BXV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log_BXV, token_BX[..., None], axis=-1)[..., 0]

    uniform_BX = jnp.stack(
        [jax.vmap(jax.random.uniform)(_keys(state, start_B + x, 1)) for x in range(X)], axis=1
    )
    kept_B = _leading(jnp.log(uniform_BX) < of_draft(log_p_BTV[:, :X]) - of_draft(log_q_BXV))
    # The first draft that is not kept is replaced out of what it was proposed too seldom for.
    at_B11 = kept_B[:, None, None]
    p_BV = jnp.exp(jnp.take_along_axis(log_p_BTV, at_B11, axis=1)[:, 0])
    # After the last draft nothing was proposed.
    q_BXV = jnp.pad(jnp.exp(log_q_BXV), ((0, 0), (0, 1), (0, 0)))
    q_BV = jnp.take_along_axis(q_BXV, at_B11, axis=1)[:, 0]
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    # Rounding may leave nothing where the two agree.
    rest_BV = jnp.where(jnp.sum(rest_BV, axis=1, keepdims=True) > 0, rest_BV, p_BV)
    own_B = _draw(_keys(state, start_B + kept_B, 2), jnp.log(rest_BV), how)
    drafts_BT = jnp.pad(token_BX, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(X + 1) == kept_B[:, None], own_B[:, None], drafts_BT), kept_B


def _append(
    state: State,
    chosen_BT: jax.Array,
    count_B: jax.Array,
    logits_BTV: jax.Array,
    active_B: jax.Array,
    stop_ids: tuple[int, ...],
) -> tuple[State, jax.Array]:
    """Puts the first `count` tokens of active rows behind those chosen; and how many there were.

    A stop id is the last one.
    """
    T = chosen_BT.shape[1]
    stop_BT = jnp.isin(chosen_BT, jnp.array(stop_ids, jnp.int32))
    until_B = jnp.where(stop_BT.any(axis=1), jnp.argmax(stop_BT, axis=1) + 1, T)
    new_B = jnp.where(active_B, jnp.minimum(count_B, until_B), 0)
    within_BT = jnp.arange(T) < new_B[:, None]
    place_BT = _count(state.tokens_BX)[:, None] + jnp.arange(T)
    place_BT = jnp.where(within_BT, place_BT, state.tokens_BX.shape[1])
    log_probs_BT = jnp.take_along_axis(logits_BTV, chosen_BT[..., None], axis=-1)[..., 0]
    log_probs_BT -= jax.nn.logsumexp(logits_BTV, axis=-1)
    put = jax.vmap(lambda row, place, values: row.at[place].set(values, mode="drop"))
    last_B = jnp.take_along_axis(chosen_BT, jnp.maximum(new_B - 1, 0)[:, None], axis=1)[:, 0]
    return replace(
        state,
        last_B=jnp.where(new_B > 0, last_B, state.last_B),
        done_B=state.done_B | (stop_BT & within_BT).any(axis=1),
        tokens_BX=put(state.tokens_BX, place_BT, chosen_BT),
        log_probs_BX=put(state.log_probs_BX, place_BT, log_probs_BT),
    ), new_B


def _count(tokens_BX: jax.Array) -> jax.Array:
    """Tokens chosen so far, per row."""
    return jnp.sum(tokens_BX >= 0, axis=1)


def _leading(true_BX: jax.Array) -> jax.Array:
    """How many are true before the first that is not."""
    return jnp.sum(jnp.cumprod(true_BX.astype(jnp.int32), axis=1), axis=1)


def _keys(state: State, position_B: jax.Array, use: int) -> jax.Array:
    """Random keys for the token after `position`, one kind for each of their uses."""
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, position_B)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, use)


def _draw(keys_B: jax.Array, log_p_BV: jax.Array, how: SamplingProgram) -> jax.Array:
    if how.greedy:
        return jnp.argmax(log_p_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, log_p_BV).astype(jnp.int32)


def _part_of(cache: Cache, kept: tuple[int, ...]) -> Cache:
    """The model's cache as a slice sees it that keeps these layers."""
    (layers,) = cache.layers
    return replace(cache, layers=(tuple(layers[i] for i in kept),))


def _put_back(cache: Cache, part: Cache, kept: tuple[int, ...]) -> Cache:
    layers, (new,) = list(cache.layers[0]), part.layers
    for i, layer in zip(kept, new):
        layers[i] = layer
    return replace(part, layers=(tuple(layers),))
