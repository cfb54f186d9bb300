"""The device's side of an engine: slots that write, and one row beside them that reads.

There is a program to put a row that was read (`reader.py`) into a slot, and one for each way of
choosing, see `Rules`, and number of slots from the first on that write, see `Slots.widths`; which
rows have which values is plain input.

Local letters: U ids with a bias, or best tokens;
I stop ids; X tokens of one burst.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.decode import State
from gemma_jax.inference.legal_tokens import LegalTokens
from gemma_jax.inference.lookup import GivenDrafts
from gemma_jax.inference.prefill import bucket
from gemma_jax.inference.reader import MOST_BEST, Reader
from gemma_jax.inference.requests import Request
from gemma_jax.inference.rows import advance_first, empty_rows, inserted, moved
from gemma_jax.inference.sampling import Sampling, SamplingRows
from gemma_jax.inference.session import padded
from gemma_jax.inference.stored_programs import StoredProgram
from gemma_jax.resident_adapters import choose_adapters, held_adapters
from gemma_kernels.platform import target_platform

MOST_BIASES = 300  # ids with a bias per request, as in OpenAI's API
MOST_STOPS = 16  # stop ids that end a row inside a burst; the host looks at all
FEW = 128  # candidates in order, while no row asks for more


@dataclass(frozen=True)
class Rules:
    """One way of choosing, which has a program of its own.

    Attributes:
      draw: `"greedy"` (all rows), `"few"` (up to 128 candidates in order), or `"all"`.
      extras: Whether there are penalties, biases, masks or best tokens to tell of.
      drafts: Whether the first pass checks drafts.
    """

    draw: str = "greedy"
    extras: bool = False
    drafts: bool = False

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, drafts: bool = False) -> "Rules":
        """What these need together."""
        rows = SamplingRows.of([one.sampling for one in requests], vocab_size)
        draw = "greedy" if rows.greedy == "all" else "few" if rows.candidates <= FEW else "all"
        return cls(draw, any(map(_has_extras, requests)), drafts)

    def rows(self, each: Sequence[Sampling], vocab_size: int) -> SamplingRows:
        """The values of rows, with the switches of this program whatever they are."""
        greedy = self.draw == "greedy"
        return replace(
            SamplingRows.of(each, vocab_size),
            greedy="all" if greedy else "some",
            sorted="none" if greedy else "some",
            candidates=0 if greedy else min(FEW, vocab_size) if self.draw == "few" else vocab_size,
            top_p=not greedy,
            min_p=not greedy,
            penalty=self.extras,
            counts=self.extras,
        )

    def __str__(self) -> str:
        drafts, extras = ", drafts" * self.drafts, ", extras" * self.extras
        return f"decode, {self.draw}{extras}{drafts}"


def every_rules(speculation: bool) -> list[Rules]:
    """All that requests may need; tokens without a choice are drafts beside masks."""
    kinds = [(False, False), (True, False), (True, True), *[(False, True)] * speculation]
    return [Rules(draw, *kind) for kind in kinds for draw in ("greedy", "few", "all")]


def _has_extras(request: Request) -> bool:
    penalties = request.sampling.counts or request.sampling.repetition_penalty != 1
    return bool(
        penalties or request.logit_bias or request.top_log_probs or request.constraint is not None
    )


@dataclass(frozen=True)
class Burst:
    """What one burst brought, per slot.

    Attributes:
      tokens, log_probs: Of each slot.
      best: Per token the most probable ones as `(id, log-probability)`, where a slot asked.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    best: list[list[list[tuple[int, float]]]]


class Slots:
    """Rows that write, each with a request or none, and one that reads.

    Args:
      model: The model to run; with several adapters beside it, each row has its own.
      slots: Number of rows B.
      context: Longest sequence in tokens; rounded up to a bucket.
      chunk: Longest stretch of prompt read in one pass.
      burst: Most tokens per row that one call of `write` chooses, beside drafts that are kept.
      drafts: Most drafts of a row in one call.
      slack: How many of them may turn out wrong.
    """

    def __init__(
        self,
        model: Gemma,
        slots: int,
        context: int,
        chunk: int,
        burst: int,
        *,
        drafts: int,
        slack: int,
    ):
        self.drafts, self._slack = drafts, slack
        self.model, self.count, self.burst, self.chunk = model, slots, burst, bucket(chunk)
        self.context = min(bucket(context), model.cfg.max_positions)
        self.vocab_size = model.cfg.vocab_size
        self._adapted: dict[tuple, Gemma] = {}
        self._has_adapters = bool(held_adapters(model))
        self.reader = Reader(
            model, self.context, self.chunk, slack=slack, adapted=self._with_adapters
        )
        self._advance_first = StoredProgram(advance_first, like=1)
        self._empty()
        self._with_adapters((None,) * slots)

    def widths(self, rules: Rules) -> list[int]:
        """Numbers of slots that there is a program for: on a CPU the first 1, 4, 16, ... too, since
        a step there costs as much for a slot that is empty; with extras the first alone."""
        few = target_platform() == "cpu" and self.model.runtime.partition is None
        some = (1,) if rules.extras else (1, 4, 16, 64, 256)
        return [n for n in some if few and n < self.count] + [self.count]

    def reset(self) -> None:
        """Empties everything, after a failure that may have taken the arrays along."""
        self._empty()
        self.reader.reset()

    def _empty(self) -> None:
        self.state = empty_rows(
            self.model,
            Rules(extras=True).rows([Sampling()] * self.count, self.vocab_size),
            max_len=self.context,
            new_tokens=self.burst + self.drafts,
            slack=self._slack,
            stops=MOST_STOPS,
        )

    def insert(self, slot: int, last: int, seed: int, token_ids: Sequence[int]) -> None:
        """Puts what was read into a slot; `last` goes behind it."""
        seen_V = np.zeros(self.vocab_size, bool)
        ids = np.array(token_ids, np.int64)
        seen_V[ids[(ids >= 0) & (ids < self.vocab_size)]] = True
        self.state = inserted(
            self._plain(),
            self.reader.state.cache,
            np.int32(slot),
            np.int32(last),
            np.uint32(seed % 2**32),
            seen_V,
            partition=self.model.runtime.partition,
        )

    def move(self, source: int, target: int) -> None:
        """Puts the row of one slot into another, which is free."""
        self.state = moved(
            self._plain(),
            np.int32(source),
            np.int32(target),
            partition=self.model.runtime.partition,
        )

    def close_ranks(self, requests: Mapping[int, Request]) -> dict[int, int]:
        """Brings rows to the first slots, where a program for fewer of them then does.

        Args:
          requests: Slot -> what runs in it.

        Returns:
          Slot as it was -> slot as it is now.
        """
        rules = Rules.of(list(requests.values()), self.vocab_size)
        rows = next(n for n in self.widths(rules) if n >= len(requests))
        free = (slot for slot in range(rows) if slot not in requests)
        places = {slot: slot if slot < rows else next(free) for slot in requests}
        for source, target in places.items():
            if source != target:
                self.move(source, target)
        return places

    def _plain(self) -> State:
        """With the switches of sampling as at first: programs are made for them, too."""
        rules = Rules(extras=True).rows([Sampling()] * self.count, self.vocab_size)
        return replace(self.state, sampling=rules)

    def write(
        self,
        requests: Mapping[int, Request],
        limits: Mapping[int, int],
        masks: Mapping[int, np.ndarray],
        drafts: Mapping[int, Sequence[int]],
        rules: Rules | None = None,
        rows: int | None = None,
    ) -> Burst:
        """Chooses tokens in slots.

        Args:
          requests: Slot -> what runs in it.
          limits: Slot -> how many tokens at most beside drafts that are kept, up to `burst`; 1
            where there are masks.
          masks: Slot -> which tokens are legal, as in `LegalTokens.of`: next, and behind each
            draft.
          drafts: Slot -> up to `drafts` tokens that may come next.
          rules: Default: what the requests need.
          rows: How many slots from the first on; of `widths`. Default: as few as hold the requests.
        """
        each = [requests.get(slot) for slot in range(self.count)]
        if rules is None:
            rules = Rules.of(list(requests.values()), self.vocab_size, any(drafts.values()))
        if rows is None:
            rows = next(n for n in self.widths(rules) if n > max(requests))
        state = self._before(each, limits, rules)
        model = self._with_adapters(tuple(r.adapter if r else None for r in each[:rows]))
        width = self.drafts if rules.drafts else 0
        first = GivenDrafts.of(drafts, rows, width) if rules.drafts else None
        if rules.extras:
            state = advance_first(
                model,
                state,
                rows=rows,
                first=first,
                allow=LegalTokens.of(masks, rows, self.vocab_size, width),
                processors=(Partial(_biased, *_biases(each[:rows], self.vocab_size)),),
            )
        elif first is not None:
            state = advance_first(model, state, rows=rows, first=first)
        else:
            state = self._advance_first(model, state, rows=rows)
        self.state = replace(state, best_ids_BXU=None, best_log_probs_BXU=None)
        return _fetched(state, each)

    def _before(
        self, each: Sequence[Request | None], limits: Mapping[int, int], rules: Rules
    ) -> State:
        """The state with what one call of `write` is to do."""
        limit_B = np.array([limits.get(slot, 0) for slot in range(self.count)], np.int32)
        shape = self.state.tokens_BX.shape
        state = replace(
            self.state,
            step_B=np.zeros(self.count, np.int32),
            limit_B=limit_B,
            done_B=limit_B == 0,
            sampling=rules.rows([r.sampling if r else Sampling() for r in each], self.vocab_size),
            stop_ids_BI=_stops(each),
            tokens_BX=np.full(shape, -1, np.int32),
            log_probs_BX=np.zeros(shape, np.float32),
        )
        if not rules.extras:
            return state
        most = min(MOST_BEST, self.vocab_size)
        return replace(
            state,
            best_ids_BXU=np.zeros((*shape, most), np.int32),
            best_log_probs_BXU=np.zeros((*shape, most), np.float32),
        )

    def warm_up(self, rules: Rules, rows: int) -> None:
        """Makes the program of these rules for the first rows, none of which takes part."""
        self.write({}, {}, {}, {}, rules, rows)

    def _with_adapters(self, chosen: tuple[str | None, ...]) -> Gemma:
        if not self._has_adapters:
            return self.model
        if chosen not in self._adapted:
            if len(self._adapted) > 32:
                self._adapted.clear()
            self._adapted[chosen] = choose_adapters(self.model, list(chosen))
        return self._adapted[chosen]


def _fetched(state: State, each: Sequence[Request | None]) -> Burst:
    counts = np.asarray(state.step_B)
    tokens_BX, log_probs_BX = np.asarray(state.tokens_BX), np.asarray(state.log_probs_BX)
    best: list[list] = [[] for _ in each]
    asked = [i for i, one in enumerate(each) if one is not None and one.top_log_probs]
    if asked:
        ids_BXU = np.asarray(state.best_ids_BXU)
        values_BXU = np.asarray(state.best_log_probs_BXU)
        for i in asked:
            top = each[i].top_log_probs
            best[i] = [
                list(zip(ids_BXU[i, x, :top].tolist(), values_BXU[i, x, :top].tolist()))
                for x in range(counts[i])
            ]
    return Burst(
        [row[:n].tolist() for row, n in zip(tokens_BX, counts)],
        [row[:n].tolist() for row, n in zip(log_probs_BX, counts)],
        best,
    )


def _stops(each: Sequence[Request | None]) -> np.ndarray:
    ids_BI = padded([() if one is None else one.stop_ids[:MOST_STOPS] for one in each])
    return np.pad(ids_BI, ((0, 0), (0, MOST_STOPS - ids_BI.shape[1])), constant_values=-1)


def _biases(each: Sequence[Request | None], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, filled up with one beyond the vocabulary, and what is added to their logits."""
    ids_BU = np.full((len(each), MOST_BIASES), vocab_size, np.int32)
    added_BU = np.zeros(ids_BU.shape, np.float32)
    for i, one in enumerate(each):
        if one is not None and one.logit_bias:
            ids_BU[i, : len(one.logit_bias)] = list(one.logit_bias)
            added_BU[i, : len(one.logit_bias)] = list(one.logit_bias.values())
    return ids_BU, added_BU


def _biased(
    ids_BU: jax.Array, added_BU: jax.Array, logits_BV: jax.Array, text_BS: jax.Array | None
) -> jax.Array:
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    return logits_BV.at[rows_B1, ids_BU].add(added_BU, mode="drop")
