"""The row of an engine that reads prompts, beside the slots that write.

A prompt is read in a batch of its own, a chunk at a time, and then put into a slot: a pass over all
slots for the sake of one prompt would cost as many times more. The row reads all of the prompt but
its last token. That one is fed by the loop, like any token chosen before: so reading chooses
nothing, and how tokens are chosen is a matter of the loop's programs alone.

There is a program for each width of a chunk. Where the log-probabilities of a prompt are asked for,
there is another one for each, which computes what a plain chunk leaves out: all of the last layers,
and logits.

Local letters: U most probable tokens; I items that soft tokens come in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.forward import forward, logits_of
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.inference.decode import advance, constrained
from gemma_jax.inference.prefill import PrefillChunk, PromptRow, bucket
from gemma_jax.inference.prefix_cache import Snapshot
from gemma_jax.inference.rows import emptied, empty_rows
from gemma_jax.inference.sampling import Sampling, SamplingRows
from gemma_jax.inference.stored_programs import StoredProgram

MOST_BEST = 20  # most probable tokens told of at one place, as in OpenAI's API
HEAD = 64  # tokens whose logits exist at one time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the tokens that follow those of a chunk.

    Attributes:
      log_probs_T: Of the token that does follow.
      best_ids_TU, best_log_probs_TU: The most probable ones, best first.
    """

    log_probs_T: jax.Array
    best_ids_TU: jax.Array
    best_log_probs_TU: jax.Array

    def told(self, count: int, top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """The first `count` as lists: their own, and of the `top` most probable `(id, value)`."""
        log_probs = np.asarray(self.log_probs_T)[:count].tolist()
        if not top:
            return log_probs, [[] for _ in log_probs]
        ids = np.asarray(self.best_ids_TU)[:count, :top].tolist()
        values = np.asarray(self.best_log_probs_TU)[:count, :top].tolist()
        return log_probs, [list(zip(*one)) for one in zip(ids, values)]


class Reader:
    """The row that reads.

    Args:
      model: The model to run.
      context, chunk: Longest text, and longest stretch of it read in one pass.
      slack: Of the cache, as in the slots.
      adapted: The model with an adapter, or none, for each row.
    """

    def __init__(
        self,
        model: Gemma,
        context: int,
        chunk: int,
        *,
        slack: int,
        adapted: Callable[[tuple[str | None, ...]], Gemma],
    ):
        self._model, self.context, self.chunk = model, context, chunk
        self._slack, self._adapted = slack, adapted
        partition = model.runtime.partition
        axes = () if partition is None else partition.axes("B")
        self._rows = math.prod(partition.mesh.shape[axis] for axis in axes) if axes else 1
        self._advance = StoredProgram(advance, like=1)
        self.reset()

    def reset(self) -> None:
        """Empties everything, after a failure that may have taken the arrays along."""
        sampling = SamplingRows.of([Sampling()] * self._rows, self._model.cfg.vocab_size)
        self.state = empty_rows(self._model, sampling, max_len=self.context, slack=self._slack)

    def clear(self) -> None:
        """Forgets what was read."""
        self.state = emptied(
            self.state,
            np.ones(self._rows, bool),
            np.zeros(self._rows, np.uint32),
            partition=self._model.runtime.partition,
        )

    def read(self, row: PromptRow, part: slice, adapter: str | None) -> None:
        """Reads a part of a prompt, behind what was read before."""
        self._read(_chunk(row, part, self._width(row, part)), adapter)

    def read_scored(
        self, row: PromptRow, part: slice, adapter: str | None, next_ids: Sequence[int]
    ) -> Scores:
        """Reads a part of a text without media, and tells how probable what follows was.

        Args:
          next_ids: The token that follows each of the part.
        """
        batch = _chunk(row, part, self._width(row, part))
        return self._read_scored(batch, adapter, next_ids)

    def warm_up(self, width: int, soft: bool) -> None:
        """Makes the program that reads a chunk of a width, with or without soft tokens."""
        batch = _nothing(width)
        if soft:
            D = self._model.cfg.d_model
            none_ITD = np.zeros((1, width, D), self._model.runtime.dtype)
            batch = replace(
                batch,
                soft=SoftTokens(
                    embeddings_ITD=none_ITD,
                    index_BT=batch.positions_BT,
                    block_BT=batch.tokens_BT,
                ),
            )
        self._read(batch, None)

    def warm_up_scored(self, width: int) -> None:
        """Makes the program that tells log-probabilities of a chunk of a width."""
        self._read_scored(_nothing(width), None, [])

    def snapshot(self, part: slice) -> list[np.ndarray]:
        """What the row holds: rings with their positions, of other layers this part."""
        start = min(part.start, max(self.context - self.chunk, 0))
        arrays = jax.tree.leaves(_cut(self.state.cache, np.int32(start), width=self.chunk))
        within = slice(part.start - start, part.stop - start)
        return [
            np.asarray(a)[..., within, :] if full and a.ndim == 5
            else np.asarray(a)[..., within] if full
            else np.asarray(a)
            for a, full in zip(arrays, self._full())
        ]  # fmt: skip

    def restore(self, chain: Sequence[Snapshot]) -> None:
        """Puts what snapshots hold, which follow one another, into the row."""
        leaves, structure = jax.tree.flatten(self.state.cache)
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
        partition = self._model.runtime.partition
        if partition is not None:
            cache = partition.place(cache)
        self.state = replace(self.state, cache=cache)

    def _width(self, row: PromptRow, part: slice) -> int:
        """A part before others is always read in the widest program."""
        own = bucket(part.stop - part.start)
        return max(self.chunk, own) if part.stop < len(row.ids) else own

    def _read(self, batch: Batch, adapter: str | None) -> None:
        model, batch = self._adapted((adapter,) * self._rows), self._filled(batch)
        state = self._advance(model, self.state, PrefillChunk(batch, None), loop=False)
        self.state = jax.block_until_ready(state)  # who reads counts the seconds

    def _read_scored(self, batch: Batch, adapter: str | None, next_ids: Sequence[int]) -> Scores:
        next_T = np.zeros(batch.tokens_BT.shape[1], np.int32)
        next_T[: len(next_ids)] = next_ids
        model = self._adapted((adapter,) * self._rows)
        cache, scores = _scored(model, self.state.cache, self._filled(batch), next_T)
        self.state = replace(self.state, cache=cache)
        return jax.block_until_ready(scores)

    def _filled(self, batch: Batch) -> Batch:
        """With rows of nothing, where a mesh wants as many as it divides them into."""
        fill = self._rows - len(batch.tokens_BT)
        if not fill:
            return batch
        tokens_BT = np.pad(batch.tokens_BT, ((0, fill), (0, 0)))
        positions_BT = np.pad(batch.positions_BT, ((0, fill), (0, 0)), constant_values=-1)
        soft = batch.soft
        if soft is not None:
            index_BT = np.pad(soft.index_BT, ((0, fill), (0, 0)), constant_values=-1)
            soft = replace(soft, index_BT=index_BT)
            if soft.block_BT is not None:
                soft = replace(soft, block_BT=np.pad(soft.block_BT, ((0, fill), (0, 0))))
        return replace(batch, tokens_BT=tokens_BT, positions_BT=positions_BT, soft=soft)

    def _full(self) -> list[bool]:
        """Whether each array of a cache has a slot for every position."""
        cache = self.state.cache
        layers = [
            array.shape[3] == cache.max_len
            for group in cache.layers
            for layer in group
            if layer is not None
            for array in layer.arrays.values()
        ]
        return [*layers, *(capacity == cache.max_len for capacity in sorted(cache.positions))]


@partial(jax.jit, donate_argnames=("cache",))
def _scored(model: Gemma, cache: Cache, batch: Batch, next_T: jax.Array) -> tuple[Cache, Scores]:
    """The cache behind a chunk, and how probable what follows each token of its first row was."""
    out = forward(model, batch, cache=cache, logits="none", capture=("final_norm",))
    x_TD = out.captured["final_norm"][0]
    most = min(MOST_BEST, model.cfg.vocab_size)

    def of_block(block: tuple[jax.Array, jax.Array]) -> Scores:
        x_TD, next_T = block
        logits_TV = logits_of(model, x_TD[None])[0]
        total_T1 = jax.nn.logsumexp(logits_TV, axis=1, keepdims=True)
        own_T1 = jnp.take_along_axis(logits_TV, next_T[:, None], axis=1) - total_T1
        best_TU, ids_TU = jax.lax.top_k(logits_TV, most)
        return Scores(own_T1[:, 0], ids_TU, best_TU - total_T1)

    size = min(HEAD, len(next_T))  # buckets are multiples of it
    blocks = x_TD.reshape(-1, size, x_TD.shape[1]), next_T.reshape(-1, size)
    scores = jax.lax.map(of_block, blocks)
    scores = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scores)
    return constrained((out.cache, scores), model.runtime.partition)


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
    n, nothing = part.stop - part.start, _nothing(width)
    tokens_BT, positions_BT = nothing.tokens_BT, nothing.positions_BT
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


def _nothing(width: int) -> Batch:
    """One row of so many places with no token in them."""
    return Batch(np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32))
