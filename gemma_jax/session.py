"""Tokens in a cache, and the compiled loop that adds to them.

`advance` is the one compiled program: it reads a chunk of prompt and then runs the token loop,
all inside one `jax.jit`. It is compiled once per bucket of shapes (see `passes.py`; the number of
new tokens and the length of the cache have the same buckets as the tokens of a pass), batch size
and top-k.

Temperature, top-p, min-p, the penalty and seeds are plain inputs; only switching one of them on
or off compiles again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.cache import Cache, init_cache
from gemma_jax.config import GemmaConfig
from gemma_jax.model import Gemma, forward
from gemma_jax.passes import Pass, Row, bucket, cut_pass
from gemma_jax.sampling import Sampling, SamplingProgram, sample
from gemma_jax.segments import Segment
from gemma_jax.sharding import Partition

T = TypeVar("T")
CHUNK = 1024  # longest stretch of prompt that one pass reads


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
            prompt.tokens_BT,
            prompt.positions_BT,
            soft=prompt.soft,
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
            model, state.last_B[:, None], position_B[:, None], cache=state.cache, logits="last"
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


class Session:
    """A batch of sequences in a cache, and the calls that extend them.

    Rows may differ in length. `read` takes text in, `write` makes the model continue; both may
    alternate, so a conversation keeps its cache from turn to turn.

    Args:
      model: The model to run.
      batch: Number of rows B.
      max_len: Longest sequence in tokens, prompt and continuation; rounded up to a bucket.
      sampling: How to choose tokens.
      seeds: One integer for all rows, or one per row. Rows with the same seed and text continue
        alike, whatever the batch around them.
      stop_ids: Tokens that end a row.
      chunk: Longest stretch of prompt read in one pass; longer prompts take several.
      slack: See `Cache`.

    Raises:
      ValueError: `max_len` exceeds the context of the model.
    """

    def __init__(
        self,
        model: Gemma,
        batch: int,
        max_len: int,
        *,
        sampling: Sampling = Sampling(),
        seeds: int | Sequence[int] = 0,
        stop_ids: Sequence[int] = (),
        chunk: int = CHUNK,
        slack: int = 0,
    ):
        cfg = model.cfg
        if max_len > cfg.max_positions:
            raise ValueError(
                f"{max_len} tokens asked for, but the context holds max_positions="
                f"{cfg.max_positions}; shorten the prompt or ask for fewer new tokens"
            )
        self.model, self.how, self.chunk = model, sampling.program(), chunk
        self.stop_ids = tuple(int(i) for i in stop_ids)
        self.max_len = min(bucket(max_len), cfg.max_positions)
        self.chosen: list[list[int]] = [[] for _ in range(batch)]  # since the last `read`
        self.log_probs: list[list[float]] = [[] for _ in range(batch)]
        self._lengths = [0] * batch  # tokens read, and chosen before the last `read`
        seed_B = [seeds] * batch if isinstance(seeds, int) else list(seeds)
        if len(seed_B) != batch:
            raise ValueError(
                f"{len(seed_B)} seeds for {batch} prompts; give one, or one per prompt"
            )
        seed_B = np.array([seed % 2**32 for seed in seed_B], np.uint32)
        self._state = _empty_state(
            seed_B,
            cfg,
            model.segments,
            self.max_len,
            model.runtime.kv_dtype,
            self.how.use_penalty,
            slack,
            model.runtime.partition,
        )

    def read(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        soft: Sequence[jax.Array | None] | None = None,
        run: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Appends tokens to every row and chooses the first new token of each.

        Args:
          rows: Token ids per row, at least one each; in `[0, V)`, or placeholders of images.
          max_new_tokens: Room to make for new tokens until the next `read`.
          soft: Per row the soft tokens `[I, T, D]` of its images, in order, or `None`: as many as
            there are placeholders.
          run: Goes on in the same compiled program until `max_new_tokens` are chosen.
          progress: Called after each pass with tokens read so far and in total.
        """
        # The last token chosen was never fed to the model: it goes in front of the new ones,
        # unless it is a stop token, which ends a text and is not part of it.
        pending = [[i for i in old[-1:] if i not in self.stop_ids] for old in self.chosen]
        rows = [old + list(new) for old, new in zip(pending, rows, strict=True)]
        starts = [n + max(len(old) - 1, 0) for n, old in zip(self._lengths, self.chosen)]
        self._check(rows, starts, max_new_tokens)
        prompts = [
            Row.of(row, start, images, self.model.cfg.vision, written=len(old))
            for row, start, old, images in zip(
                rows, starts, pending, soft or [None] * len(rows), strict=True
            )
        ]
        self._lengths = [start + len(row) for start, row in zip(starts, rows)]
        self.chosen, self.log_probs = [[] for _ in rows], [[] for _ in rows]
        shape = (len(rows), self._width(max_new_tokens))
        self._state = replace(
            self._state,
            step=np.int32(0),
            done_B=np.zeros(len(rows), bool),
            tokens_BX=np.full(shape, -1, np.int32),
            log_probs_BX=np.zeros(shape, np.float32),
        )
        cuts = [prompt.cuts(self.chunk) for prompt in prompts]
        passes = max(len(row_cuts) for row_cuts in cuts)
        for n in range(passes):
            # A row with fewer pieces than others waits at its end.
            parts = [row_cuts[n] if n < len(row_cuts) else None for row_cuts in cuts]
            last = n == passes - 1
            limit = max_new_tokens if run and last else 0
            self._advance(limit, cut_pass(prompts, parts), loop=run)
            if progress is not None:
                read = [part.stop if part else len(row) for part, row in zip(parts, rows)]
                progress(max(read), max(len(row) for row in rows))

    def write(self, limit: int) -> list[list[int]]:
        """Continues until `limit` tokens are chosen since the last `read`, or all rows stopped.

        Returns the tokens chosen since the last `read`, per row, stop token included.
        """
        if int(self._state.step) < limit:
            self._advance(limit, None, loop=True)
        tokens_BX, log_probs_BX = np.asarray(self._state.tokens_BX), self._state.log_probs_BX
        counts = [int(np.sum(row >= 0)) for row in tokens_BX]
        self.chosen = [row[:n].tolist() for row, n in zip(tokens_BX, counts)]
        self.log_probs = [row[:n].tolist() for row, n in zip(np.asarray(log_probs_BX), counts)]
        return self.chosen

    def stop(self, row: int) -> None:
        """Ends a row from outside, after a stop text for example."""
        self._state = replace(self._state, done_B=self._state.done_B.at[row].set(True))

    @property
    def done(self) -> list[bool]:
        """Rows that met a stop id or were stopped."""
        return np.asarray(self._state.done_B).tolist()

    @property
    def room(self) -> int:
        """Tokens that still fit into the longest row."""
        return self.max_len - max(n + len(new) for n, new in zip(self._lengths, self.chosen))

    def _width(self, max_new_tokens: int) -> int:
        """Columns for new tokens."""
        return bucket(max_new_tokens)

    def _advance(self, limit: int, prompt: Pass | None, *, loop: bool) -> None:
        self._state = advance(
            self.model,
            self._state,
            self.how,
            np.int32(limit),
            prompt,
            stop_ids=self.stop_ids,
            loop=loop,
        )

    def _check(self, rows, starts, max_new_tokens):
        vocab, vision = self.model.cfg.vocab_size, self.model.cfg.vision
        allowed = set() if vision is None else {vision.image_token}
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens=} must be at least 1")
        for i, (row, start) in enumerate(zip(rows, starts)):
            if not row:
                raise ValueError(f"prompt {i} is empty; give at least one token")
            if min(row) < 0 or max(set(row) - allowed, default=0) >= vocab:
                raise ValueError(f"prompt {i} has ids outside [0, {vocab}), the model's vocabulary")
            if (need := start + len(row) + max_new_tokens) > self.max_len:
                raise ValueError(
                    f"{need} tokens needed ({start + len(row)} of text, {max_new_tokens} new), but "
                    f"the session holds max_len={self.max_len}; shorten the text or make room"
                )


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6, 7))
def _empty_state(
    seed_B: jax.Array,
    cfg: GemmaConfig,
    segments: tuple[Segment, ...],
    max_len: int,
    dtype: jnp.dtype,
    penalty: bool,
    slack: int,
    partition: Partition | None,
) -> State:
    """One program rather than one per array: most of a small model's start was these."""
    batch = len(seed_B)
    state = State(
        cache=init_cache(cfg, segments, batch, max_len, dtype, slack),
        last_B=jnp.zeros(batch, jnp.int32),
        keys_B=jax.vmap(jax.random.key)(seed_B),
        done_B=jnp.zeros(batch, bool),
        step=jnp.int32(0),
        tokens_BX=jnp.zeros((batch, 0), jnp.int32),
        log_probs_BX=jnp.zeros((batch, 0), jnp.float32),
        seen_BV=jnp.zeros((batch, cfg.vocab_size), bool) if penalty else None,
    )
    return placed(state, partition)
