"""Vectors for many callers at once: who waits goes into one pass with the others."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.text_embedding.batches import padded_length
from gemma_jax.text_embedding.embed import embed_tokens, max_tokens, require_head

TOGETHER = 256  # rows that go into the passes of one round: who comes meanwhile waits for these


class TooManyError(Exception):
    """So many wait already that no more are taken."""


@dataclass(frozen=True)
class _Asked:
    rows: Sequence[Sequence[int]]
    dimensions: int | None
    vectors: Future = field(default_factory=Future)


class Embedder:
    """Answers calls from any thread, in one of its own.

    Args:
      model: One with a head for embeddings.
      queue: How many calls may wait.

    Raises:
      ValueError: The model has no such head.

    Examples:
      >>> import gemma_jax as gj
      >>> from flax import nnx
      >>> embedder = Embedder(gj.Gemma(gj.preset("tiny-embeddinggemma"), rngs=nnx.Rngs(0)))
      >>> embedder.start()
      >>> embedder.submit([[2, 5, 1], [2, 1]], dimensions=16).result().shape
      (2, 16)
      >>> embedder.close()
    """

    def __init__(self, model: Gemma, *, queue: int = 64):
        require_head(model)
        self.model, self._bound = model, queue
        self._waiting: deque[_Asked] = deque()
        self._running = 0
        self._change = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, rows: Sequence[Sequence[int]], dimensions: int | None = None) -> Future:
        """Takes token ids of texts, BOS and EOS among them, see `embed_tokens`.

        Returns:
          The vectors to come, float32 `[number of rows, dimensions]`; it may be cancelled. What
          `embed_tokens` raises about these rows, it raises.

        Raises:
          TooManyError: Too many wait, or it is about to end.
        """
        asked = _Asked(rows, dimensions)
        with self._change:
            if self._closing:
                raise TooManyError("no more texts are taken: it is about to stop")
            if len(self._waiting) >= self._bound:
                raise TooManyError(f"{len(self._waiting)} requests wait already")
            self._waiting.append(asked)
            self._change.notify_all()
        return asked.vectors

    def stats(self) -> Mapping[str, object]:
        """Calls that run and that wait."""
        with self._change:
            return dict(running=self._running, waiting=len(self._waiting))

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Makes the programs for one text at a time, of up to 512 tokens."""
        widths = dict.fromkeys(map(padded_length, range(1, min(max_tokens(self.model), 512) + 1)))
        for width in widths:
            if progress is not None:
                progress(f"embed {width}")
            embed_tokens(self.model, [[0] * min(width, max_tokens(self.model))])

    def start(self) -> None:
        """Answers from now on."""
        with self._change:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stops; what waits is cancelled."""
        with self._change:
            self._closing = True
            left, self._waiting = list(self._waiting), deque()
            self._change.notify_all()
        for asked in left:
            asked.vectors.cancel()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._waiting)
                if self._closing:
                    return
                together = self._take()
                self._running = len(together)
            self._answer(together)
            with self._change:
                self._running = 0

    def _take(self) -> list[_Asked]:
        """Calls that wait, in their order, up to `TOGETHER` rows; one at least."""
        together, rows = [], 0
        while self._waiting and (not together or rows + len(self._waiting[0].rows) <= TOGETHER):
            asked = self._waiting.popleft()
            if asked.vectors.set_running_or_notify_cancel():
                together.append(asked)
                rows += len(asked.rows)
        return together

    def _answer(self, together: list[_Asked]) -> None:
        """Those that ask for vectors of one width in one pass; a fault ends its own call alone."""
        for dimensions in dict.fromkeys(asked.dimensions for asked in together):
            some = [asked for asked in together if asked.dimensions == dimensions]
            try:
                vectors = self._embed(some, dimensions)
            except Exception as error:
                if len(some) == 1:
                    some[0].vectors.set_exception(error)
                else:
                    for asked in some:
                        self._answer([asked])
                continue
            for asked, own in zip(some, vectors):
                asked.vectors.set_result(own)

    def _embed(self, some: list[_Asked], dimensions: int | None) -> list[np.ndarray]:
        rows = [row for asked in some for row in asked.rows]
        vectors = embed_tokens(self.model, rows, dimensions=dimensions)
        ends = np.cumsum([len(asked.rows) for asked in some])
        return np.split(vectors, ends[:-1])
