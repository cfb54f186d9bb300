"""The device's side of an engine: slots that write, and one row beside them that reads.

A prompt is read in a batch of its own, a chunk at a time, and then put into a slot: a pass over all
slots for the sake of one prompt would cost as many times more. The row reads all of the prompt but
its last token. That one is fed by the loop, like any token chosen before: so reading chooses
nothing, and how tokens are chosen is a matter of the loop's programs alone.

There is a program for each width of a chunk, one to put a row into a slot, and one for each way of
choosing, see `Rules`, and number of slots from the first on that write, see `Slots.widths`; which
rows have which values is plain input.

Local letters: U ids with a bias, or best tokens;
I stop ids; X tokens of one burst.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.inference.decode import State, advance, empty_state
from gemma_jax.inference.legal_tokens import LegalTokens
from gemma_jax.inference.lookup import GivenDrafts
from gemma_jax.inference.prefill import PrefillChunk, PromptRow, bucket
from gemma_jax.inference.prefix_cache import Snapshot
from gemma_jax.inference.requests import Request
from gemma_jax.inference.rows import advance_first, emptied, inserted
from gemma_jax.inference.sampling import Sampling, SamplingRows
from gemma_jax.inference.session import padded
from gemma_jax.inference.stored_programs import StoredProgram
from gemma_jax.resident_adapters import choose_adapters, held_adapters
from gemma_kernels.platform import target_platform

MOST_BIASES = 300  # ids with a bias per request, as in OpenAI's API
MOST_BEST = 20  # most probable tokens told of at one place, as there
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
        partition = model.runtime.partition
        axes = () if partition is None else partition.axes("B")
        self._readers = math.prod(partition.mesh.shape[axis] for axis in axes) if axes else 1
        self._adapted: dict[tuple, Gemma] = {}
        self._has_adapters = bool(held_adapters(model))
        self._advance = StoredProgram(advance, like=1)
        self._advance_first = StoredProgram(advance_first, like=1)
        self.reset()
        self._with_adapters((None,) * slots)

    def widths(self, rules: Rules) -> list[int]:
        """Numbers of slots that there is a program for: on a CPU the first 1, 4, 16, ... too, since
        a step there costs as much for a slot that is empty; with extras the first alone."""
        few = target_platform() == "cpu" and self.model.runtime.partition is None
        some = (1,) if rules.extras else (1, 4, 16, 64, 256)
        return [n for n in some if few and n < self.count] + [self.count]

    def reset(self) -> None:
        """Empties everything, after a failure that may have taken the arrays along."""
        self.state = self._empty(self.count, self.burst + self.drafts, Rules(extras=True))
        self.reset_reader()

    def reset_reader(self) -> None:
        """The same for the row that reads alone."""
        self.reader = self._empty(self._readers, 0, Rules())

    def _empty(self, batch: int, new_tokens: int, rules: Rules) -> State:
        runtime = self.model.runtime
        return empty_state(
            np.zeros(batch, np.uint32),
            rules.rows([Sampling()] * batch, self.vocab_size),
            np.full((batch, MOST_STOPS), -1, np.int32),
            cfg=self.model.cfg,
            layer_groups=self.model.layer_groups,
            max_len=self.context,
            dtype=runtime.kv_dtype,
            new_tokens=new_tokens,
            slack=self._slack,
            partition=runtime.partition,
        )

    def clear_reader(self) -> None:
        """Forgets what was read."""
        size = self._readers
        self.reader = emptied(
            self.reader,
            np.ones(size, bool),
            np.zeros(size, np.uint32),
            partition=self.model.runtime.partition,
        )

    def read(self, row: PromptRow, part: slice, adapter: str | None) -> None:
        """Reads a part of a prompt, behind what was read before."""
        whole = part.stop < len(row.ids)  # a part before others: always in the widest program
        width = self.chunk if whole else bucket(part.stop - part.start)
        self._read(_chunk(row, part, max(width, bucket(part.stop - part.start))), adapter)

    def _read(self, batch: Batch, adapter: str | None) -> None:
        fill = self._readers - len(batch.tokens_BT)
        if fill:
            tokens_BT = np.pad(batch.tokens_BT, ((0, fill), (0, 0)))
            positions_BT = np.pad(batch.positions_BT, ((0, fill), (0, 0)), constant_values=-1)
            soft = batch.soft
            if soft is not None:
                index_BT = np.pad(soft.index_BT, ((0, fill), (0, 0)), constant_values=-1)
                soft = replace(soft, index_BT=index_BT)
                if soft.block_BT is not None:
                    soft = replace(soft, block_BT=np.pad(soft.block_BT, ((0, fill), (0, 0))))
            batch = replace(batch, tokens_BT=tokens_BT, positions_BT=positions_BT, soft=soft)
        model = self._with_adapters((adapter,) * self._readers)
        reader = self._advance(model, self.reader, PrefillChunk(batch, None), loop=False)
        self.reader = jax.block_until_ready(reader)  # who reads counts the seconds

    def snapshot(self, part: slice) -> list[np.ndarray]:
        """What the reading row holds: rings with their positions, of other layers this part."""
        start = min(part.start, max(self.context - self.chunk, 0))
        arrays = jax.tree.leaves(_cut(self.reader.cache, np.int32(start), width=self.chunk))
        within = slice(part.start - start, part.stop - start)
        return [
            np.asarray(a)[..., within, :] if full and a.ndim == 5
            else np.asarray(a)[..., within] if full
            else np.asarray(a)
            for a, full in zip(arrays, self._full())
        ]  # fmt: skip

    def restore(self, chain: Sequence[Snapshot]) -> None:
        """Puts what snapshots hold, which follow one another, into the reading row."""
        leaves, structure = jax.tree.flatten(self.reader.cache)
        new = []
        for i, (old, full) in enumerate(zip(leaves, self._full())):
            position = jnp.issubdtype(old.dtype, jnp.integer) and old.ndim == 2
            array = np.full(old.shape, -1 if position else 0, old.dtype)
            row = array[:1] if position else array[:, :1]
            if not full:
                row[...] = chain[-1].arrays[i]
            else:
                axis = 3 if old.ndim > 2 else 1
                for one in chain:
                    at = (slice(None),) * axis + (slice(one.start, one.stop),)
                    row[at] = one.arrays[i]
            new.append(array)
        cache = jax.tree.unflatten(structure, new)
        partition = self.model.runtime.partition
        if partition is not None:
            cache = partition.place(cache)
        self.reader = replace(self.reader, cache=cache)

    def _full(self) -> list[bool]:
        """Whether each array of a cache has a slot for every position."""
        cache = self.reader.cache
        layers = [
            array.shape[3] == cache.max_len
            for group in cache.layers
            for layer in group
            if layer is not None
            for array in layer.arrays.values()
        ]
        return [*layers, *(capacity == cache.max_len for capacity in sorted(cache.positions))]

    def insert(self, slot: int, last: int, seed: int, token_ids: Sequence[int]) -> None:
        """Puts what was read into a slot; `last` goes behind it."""
        seen_V = np.zeros(self.vocab_size, bool)
        ids = np.array(token_ids, np.int64)
        seen_V[ids[(ids >= 0) & (ids < self.vocab_size)]] = True
        # With the switches of sampling as at first: they are part of what a program is made for.
        rules = Rules(extras=True).rows([Sampling()] * self.count, self.vocab_size)
        self.state = inserted(
            replace(self.state, sampling=rules),
            self.reader.cache,
            np.int32(slot),
            np.int32(last),
            np.uint32(seed % 2**32),
            seen_V,
            partition=self.model.runtime.partition,
        )

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

    def warm_up_reading(self, width: int, soft: bool) -> None:
        """Makes the program that reads a chunk of a width, with or without soft tokens."""
        tokens_BT = np.zeros((1, width), np.int32)
        nothing_BT = np.full_like(tokens_BT, -1)
        batch = Batch(tokens_BT, nothing_BT)
        if soft:
            D = self.model.cfg.d_model
            none_ITD = np.zeros((1, width, D), self.model.runtime.dtype)
            batch = replace(
                batch,
                soft=SoftTokens(embeddings_ITD=none_ITD, index_BT=nothing_BT, block_BT=tokens_BT),
            )
        self._read(batch, None)

    def _with_adapters(self, chosen: tuple[str | None, ...]) -> Gemma:
        if not self._has_adapters:
            return self.model
        if chosen not in self._adapted:
            if len(self._adapted) > 32:
                self._adapted.clear()
            self._adapted[chosen] = choose_adapters(self.model, list(chosen))
        return self._adapted[chosen]


@partial(jax.jit, static_argnames=("width",))
def _cut(cache: Cache, start: jax.Array, *, width: int) -> Cache:
    """The first row: rings whole, and some slots of what has one for every position."""

    def cut(a: jax.Array, axis: int) -> jax.Array:
        a = jax.lax.slice_in_dim(a, 0, 1, axis=0 if a.ndim == 2 else 1)
        if a.shape[axis] != cache.max_len:
            return a
        return jax.lax.dynamic_slice_in_dim(a, start, min(width, a.shape[axis]), axis=axis)

    layers = jax.tree.map(partial(cut, axis=3), cache.layers)
    return replace(
        cache, layers=layers, positions={c: cut(p, 1) for c, p in cache.positions.items()}
    )


def _chunk(row: PromptRow, part: slice, width: int) -> Batch:
    """A part of one row in so many places; all of its soft tokens in one item, place by place."""
    n = part.stop - part.start
    tokens_BT = np.zeros((1, width), np.int32)
    positions_BT = np.full_like(tokens_BT, -1)
    tokens_BT[0, :n] = row.ids[part]
    positions_BT[0, :n] = row.start + np.arange(part.start, part.stop)
    at = np.flatnonzero(row.item[part] >= 0)
    if not len(at):
        return Batch(tokens_BT, positions_BT)
    pieces = [np.asarray(row.soft[row.item[part][i]])[row.offset[part][i]] for i in at]
    soft_ITD = np.zeros((1, width, pieces[0].shape[-1]), pieces[0].dtype)
    soft_ITD[0, at] = pieces
    index_BT, block_BT = np.full_like(tokens_BT, -1), np.zeros_like(tokens_BT)
    index_BT[0, at] = at
    block_BT[0, :n] = row.block[part] + 1
    return Batch(
        tokens_BT,
        positions_BT,
        soft=SoftTokens(embeddings_ITD=soft_ITD, index_BT=index_BT, block_BT=block_BT),
    )


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
