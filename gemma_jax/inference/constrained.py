"""Rows that follow constraints: the host says before each token which ones are legal.

One call of the compiled loop chooses one token per row. Tokens that must come next are read in one
pass with the last one chosen, as many as there are: a JSON object's skeleton costs few passes. A
draw depends on a token's position alone, so the text is the same as without.

Local letters: X forced tokens; T = X + 1 tokens read; W words of a mask.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.decode import Allow, State, append, choose, constrained
from gemma_jax.inference.legal_tokens import LegalTokens
from gemma_jax.inference.logits_processors import LogitsProcessor
from gemma_jax.inference.requests import Constraint
from gemma_jax.inference.session import Session

# Forced tokens of a pass, which chooses one more: a program for each. Other numbers are read in
# several passes and never padded, as on a CPU a pass costs nearly what its tokens do.
WIDTHS = (3, 15)


@dataclass(frozen=True)
class NextTokens:
    """What comes next in a row: tokens without a choice, then one that `mask_W` says is legal.

    `mask_W` is `None` where the text is whole after them.
    """

    forced: list[int]
    mask_W: np.ndarray | None


class ConstrainedSession(Session):
    """A `Session` each of whose rows follows a constraint, or none.

    Args:
      constraints: One per row, at the place where the row's first new token comes; `None`: all
        tokens are legal.
      read_ahead: Whether to read forced tokens in one pass.
      And those of `Session`.

    Raises:
      ValueError: As `Session`; from `decode`, where a constraint leaves no token.
    """

    def __init__(
        self,
        model: Gemma,
        batch: int,
        max_len: int,
        *,
        constraints: Sequence[Constraint | None],
        read_ahead: bool = True,
        **options,
    ):
        if len(constraints) != batch:
            raise ValueError(f"{len(constraints)} constraints for {batch} rows; give one for each")
        all_legal = LegalTokens.of({}, batch, model.cfg.vocab_size)
        super().__init__(model, batch, max_len, allow=all_legal, **options)
        self._constraints, self._read_ahead = list(constraints), read_ahead
        self._most = [0] * batch  # new tokens that there is room for
        self._followed = [0] * batch  # how many of the chosen tokens the constraint has accepted
        self._pool = ThreadPoolExecutor(os.cpu_count()) if batch > 1 else None

    def prefill(
        self,
        rows: Sequence[Sequence[int] | None],
        *,
        max_new_tokens: int,
        soft: Sequence[Sequence[jax.Array] | jax.Array | None] | None = None,
        run: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        given = [i for i, row in enumerate(rows) if row is not None]
        for i in given:
            self._followed[i], self._most[i] = 0, max_new_tokens
        self._permit(dict(zip(given, self._each(self._mask, given))))
        super().prefill(rows, max_new_tokens=max_new_tokens, soft=soft, progress=progress)
        if run:
            self.decode(max_new_tokens)

    def decode(self, limit: int | Sequence[int]) -> list[list[int]]:
        batch = len(self.chosen)
        limits = [limit] * batch if isinstance(limit, (int, np.integer)) else list(limit)
        self._follow(limits)
        while active := [i for i in range(batch) if self._goes_on(i, limits[i])]:
            nexts = self._each(self._look_ahead, active)
            coming = dict(zip(active, nexts))
            self._permit({i: n.mask_W for i, n in coming.items()})
            if any(n.forced for n in nexts):
                self._read(coming)
            else:
                lengths = [len(ids) for ids in self.chosen]
                super().decode([n + (i in coming) for i, n in enumerate(lengths)])
            self._follow(limits)
        return super().decode(limits)

    def _goes_on(self, row: int, limit: int) -> bool:
        return not self._ended_B[row] and len(self.chosen[row]) < limit

    def _follow(self, limits: Sequence[int]) -> None:
        """Tells constraints what was chosen, and ends the rows whose text is whole."""
        step_B = np.asarray(self._state.step_B)
        super().decode(np.minimum(step_B, limits).tolist())  # chooses none, but says which were
        self._ended_B = np.asarray(self._state.done_B).copy()
        for i, (constraint, ids) in enumerate(zip(self._constraints, self.chosen)):
            if constraint is None or self._ended_B[i]:
                continue
            constraint.accept(ids[self._followed[i] :])
            self._followed[i] = max(self._followed[i], len(ids))
            if constraint.complete:
                self.stop(i)
                self._ended_B[i] = True

    def _each(self, work: Callable, rows: Sequence[int]) -> list:
        """Work on rows, at the same time: constraints leave Python's lock while they work."""
        return list(self._pool.map(work, rows) if self._pool else map(work, rows))

    def _mask(self, row: int) -> np.ndarray | None:
        constraint = self._constraints[row]
        return None if constraint is None else constraint.mask()

    def _look_ahead(self, row: int) -> NextTokens:
        constraint = self._constraints[row]
        if constraint is None:
            return NextTokens([], None)
        # Maybe more than this call was asked for; that waits for the next one, as with drafts.
        room = self._most[row] - len(self.chosen[row]) - 1
        forced = constraint.forced()[:room] if self._read_ahead else []
        forced = forced[: max((width for width in WIDTHS if width <= len(forced)), default=0)]
        if not forced:
            return NextTokens([], constraint.mask())
        constraint.accept(forced)
        self._followed[row] += len(forced)
        return NextTokens(forced, None if constraint.complete else constraint.mask())

    def _permit(self, masks: dict[int, np.ndarray | None]) -> None:
        self.allow = LegalTokens.of(masks, len(self.chosen), self.model.cfg.vocab_size)

    def _read(self, coming: dict[int, NextTokens]) -> None:
        batch, longest = len(self.chosen), max(len(n.forced) for n in coming.values())
        forced_BX = np.zeros((batch, next(w for w in WIDTHS if w >= longest)), np.int32)
        count_B, more_B = np.zeros(batch, np.int32), np.zeros(batch, bool)
        for i, n in coming.items():
            forced_BX[i, : len(n.forced)] = n.forced
            count_B[i] = len(n.forced)
            more_B[i] = n.mask_W is not None or not n.forced
        self._state = read_forced(
            self.model, self._state, forced_BX, count_B, more_B, self.allow, self._processors
        )


@partial(jax.jit, donate_argnames=("state",))
def read_forced(
    model: Gemma,
    state: State,
    forced_BX: jax.Array,
    count_B: jax.Array,
    more_B: jax.Array,
    allow: Allow,
    processors: tuple[LogitsProcessor, ...],
) -> State:
    """Reads tokens behind the last one chosen, as if they had been chosen, and chooses one more.

    Args:
      forced_BX: int32, padded on the right.
      count_B: How many there are, at least 0.
      more_B: bool; rows that choose one more. A row without that and without forced tokens stays.
    """
    start_B, X = state.cache.length_B, forced_BX.shape[1]
    # The last token of a row is in the cache only if one more is chosen.
    until_B1 = (count_B + more_B)[:, None]
    index_T = jnp.arange(X + 1)
    read_BT = jnp.concatenate([state.last_B[:, None], forced_BX], axis=1)
    position_BT = jnp.where(index_T < until_B1, start_B[:, None] + index_T, -1)
    out = forward(model, Batch(read_BT, position_BT), cache=state.cache)
    state = replace(state, cache=out.cache)
    state = append(state, forced_BX, count_B, out.logits[:, :X])
    logits_B1V = jnp.take_along_axis(out.logits, count_B[:, None, None], axis=1)
    chosen_B1 = choose(state, logits_B1V, start_B + count_B + 1, allow, processors)
    state = append(state, chosen_B1, jnp.where(more_B, 1, 0), logits_B1V)
    return constrained(state, model.runtime.partition)
