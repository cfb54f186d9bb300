"""Keeps sequences in a cache on the host's side: what to read, how far to write, what came out."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.decode import advance, empty_state
from gemma_jax.inference.prefill import Pass, Row, bucket, prefill_chunk
from gemma_jax.inference.sampling import Sampling

CHUNK = 1024  # longest stretch of prompt that one pass reads


class Session:
    """Keeps a batch of sequences in a cache, and extends them by prompts and by the model's tokens.

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

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> session = gj.Session(model, batch=1, max_len=64, stop_ids=tok.stop_ids)
      >>> session.read([tok.encode("Which digit is left?", bos=True)], max_new_tokens=4)
      >>> session.write(4)  # without a picture, the model has nothing to say
      [[1]]
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
        self._state = empty_state(
            seed_B,
            cfg,
            model.layer_groups,
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
            self._advance(limit, prefill_chunk(prompts, parts), loop=run)
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
