"""Speculative decoding: a small model drafts, the large one checks all drafts in one pass.

The drafts that the large model would have chosen are kept, and one token of its own follows, so
that every pass yields at least one; see `verification.py`.

The drafts come from a slice of the model itself (`gemma_jax.matformer`), so no other weights are
needed; where the slice computes the same keys and values as the model, no other cache either.

Local letters: X drafts of one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.decode import Proposal, State
from gemma_jax.inference.logits_processors import LogitsProcessor
from gemma_jax.inference.prefill import PrefillChunk
from gemma_jax.inference.sampling import Sampling, distribution
from gemma_jax.inference.session import CHUNK, Session
from gemma_jax.inference.verification import draft_keys, draw
from gemma_jax.matformer import Slice, at, shares_cache
from gemma_jax.placement import empty_cache

DRAFT_TOKENS = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafts:
    """What a `DraftModel` keeps from pass to pass.

    Attributes:
      cache: The draft model's, up to the token before the last one chosen; `None` where it works in
        the model's.
      proposed_B, accepted_B: How many drafts there were since the row was empty, and how many of
        them were kept.
    """

    cache: Cache | None
    proposed_B: jax.Array
    accepted_B: jax.Array

    def cleared(self, empty_B: jax.Array) -> "Drafts":
        """The same with nothing in the rows that are `True`."""
        return Drafts(
            cache=None if self.cache is None else self.cache.cleared(empty_B),
            proposed_B=jnp.where(empty_B, 0, self.proposed_B),
            accepted_B=jnp.where(empty_B, 0, self.accepted_B),
        )

    def rewound(self, length_B: jax.Array) -> "Drafts":
        """The same without tokens at positions of `length` and beyond."""
        return self if self.cache is None else replace(self, cache=self.cache.rewound(length_B))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftModel:
    """A smaller model that drafts for another: a `Propose` of the token loop.

    Attributes:
      model: With the vocabulary of the other.
      count: Drafts per pass.
      shared: The layers of the other model that it consists of, where it works in their cache;
        `None` if it has its own.
    """

    model: Gemma
    count: int = field(metadata={"static": True})
    shared: tuple[int, ...] | None = field(metadata={"static": True})

    @classmethod
    def of(cls, model: Gemma, draft: Gemma | Slice, count: int) -> "DraftModel":
        """A slice of `model`, or any other model, as its draft model. Raises `ValueError`."""
        if count < 1:
            raise ValueError(f"draft_tokens={count} must be at least 1")
        shared = None
        if isinstance(draft, Slice):
            if shares_cache(model.cfg, draft):
                shared = draft.kept(len(model.cfg.layers))
            draft = at(model, draft, allow_irregular=True)
        if draft.cfg.vocab_size != model.cfg.vocab_size:
            raise ValueError(
                f"the draft model has {draft.cfg.vocab_size} tokens, the model "
                f"{model.cfg.vocab_size}; they must have the same vocabulary"
            )
        return cls(draft, count, shared)

    def start(self, batch: int, max_len: int) -> Drafts:
        none_B = np.zeros(batch, np.int32)
        own = self.shared is None
        cache = empty_cache(self.model, batch, max_len, self.count) if own else None
        return Drafts(cache, none_B, none_B)

    def prefill(self, drafts: Drafts, prompt: PrefillChunk) -> Drafts:
        if drafts.cache is None:
            return drafts
        out = forward(self.model, prompt.batch, cache=drafts.cache, logits="none")
        return replace(drafts, cache=out.cache)

    def __call__(self, state: State, active_B: jax.Array) -> Proposal:
        start_B = state.cache.length_B

        def draft(carry: tuple[Cache, jax.Array], step: jax.Array):
            cache, last_B = carry
            position_B = jnp.where(active_B, start_B + step, -1)
            batch = Batch(last_B[:, None], position_B[:, None])
            out = forward(self.model, batch, cache=cache, logits="last")
            log_q_BV = out.logits[:, 0]
            if state.sampling.greedy != "all":
                log_q_BV = distribution(out.logits, state.sampling)[:, 0]
            keys_B = draft_keys(state.keys_B, start_B + step, 0)
            token_B = draw(keys_B, log_q_BV, state.sampling)
            return (out.cache, token_B), (token_B, log_q_BV)

        cache = state.drafts.cache if self.shared is None else _part_of(state.cache, self.shared)
        steps = jnp.arange(self.count)
        (cache, _), (token_XB, log_q_XBV) = jax.lax.scan(draft, (cache, state.last_B), steps)
        whole, drafts = state.cache, state.drafts
        if self.shared is None:
            drafts = replace(drafts, cache=cache)
        else:
            whole = _put_back(state.cache, cache, self.shared)
        drafts = replace(drafts, proposed_B=drafts.proposed_B + jnp.where(active_B, self.count, 0))
        return Proposal(token_XB.T, jnp.moveaxis(log_q_XBV, 0, 1), whole, drafts)

    def settle(
        self, proposal: Proposal, state: State, kept_B: jax.Array, new_B: jax.Array
    ) -> Drafts:
        drafts, cache = proposal.drafts, proposal.drafts.cache
        if self.shared is None:
            # Where all drafts were kept, the draft model has not read the last of them.
            length_B = state.cache.length_B
            behind_B = new_B == self.count + 1
            last_B1 = proposal.drafts_BX[:, -1:]
            position_B1 = jnp.where(behind_B, length_B - 1, -1)[:, None]

            def catch_up(cache: Cache) -> Cache:
                batch = Batch(last_B1, position_B1)
                return forward(self.model, batch, cache=cache, logits="none").cache

            cache = jax.lax.cond(jnp.any(behind_B), catch_up, lambda cache: cache, cache)
            cache = cache.rewound(length_B)
        return replace(drafts, cache=cache, accepted_B=drafts.accepted_B + kept_B)


class SpeculativeSession(Session):
    """A `Session` whose `decode` drafts and checks.

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
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        seeds: int | Sequence[int] = 0,
        stop_ids: Sequence[int] = (),
        chunk: int = CHUNK,
        logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
    ):
        super().__init__(
            model, batch, max_len, sampling=sampling, seeds=seeds, stop_ids=stop_ids, chunk=chunk,
            propose=DraftModel.of(model, draft, draft_tokens), logits_processors=logits_processors,
        )  # fmt: skip

    @property
    def proposed(self) -> list[int]:
        return np.asarray(self._state.drafts.proposed_B).tolist()

    @property
    def accepted(self) -> list[int]:
        return np.asarray(self._state.drafts.accepted_B).tolist()


def _part_of(cache: Cache, kept: tuple[int, ...]) -> Cache:
    """The model's cache as a slice sees it that keeps these layers."""
    (layers,) = cache.layers
    return replace(cache, layers=(tuple(layers[i] for i in kept),))


def _put_back(cache: Cache, part: Cache, kept: tuple[int, ...]) -> Cache:
    layers, (new,) = list(cache.layers[0]), part.layers
    for i, layer in zip(kept, new):
        layers[i] = layer
    return replace(part, layers=(tuple(layers),))
