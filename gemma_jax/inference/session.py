"""Keeps sequences in a cache on the host's side: what to read, how far to write, what came out.

Local letters: X tokens chosen; I stop ids.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.decode import Allow, Propose, advance, empty_state
from gemma_jax.inference.logits_processors import LogitsProcessor, as_processors
from gemma_jax.inference.prefill import PrefillChunk, PromptRow, bucket, prefill_chunk
from gemma_jax.inference.rows import emptied, rewound
from gemma_jax.inference.sampling import Sampling, SamplingRows
from gemma_jax.inference.stored_programs import StoredProgram
from gemma_jax.multimodal.modality import modalities_of

CHUNK = 1024  # longest stretch of prompt that one pass reads


class Session:
    """Keeps a batch of sequences in a cache, and extends them by prompts and by the model's tokens.

    Rows may differ in length. `prefill` takes text in, `decode` makes the model continue; both may
    alternate, so a conversation keeps its cache from turn to turn. Rows may also come and go:
    `clear` empties one, and a `prefill` with `None` for the others gives it another text.

    Args:
      model: The model to run.
      batch: Number of rows B.
      max_len: Longest sequence in tokens, prompt and continuation; rounded up to a bucket.
      sampling: How to choose tokens, for all rows or one per row.
      seeds: One integer for all rows, or one per row. Rows with the same seed and text continue
        alike, whatever the batch around them.
      stop_ids: Tokens that end a row.
      chunk: Longest stretch of prompt read in one pass; longer prompts take several.
      propose: Drafts tokens for the model to check, see `SpeculativeSession`.
      allow: Says which tokens are legal, see `decode.Allow`.
      logits_processors: Functions `(logits_BV, text_BS) -> logits_BV` that change logits before a
        token is chosen, see `generate`.

    Raises:
      ValueError: `max_len` exceeds the context of the model, or a penalty with drafts.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> session = gj.Session(model, batch=1, max_len=64, stop_ids=tok.stop_ids)
      >>> session.prefill([tok.encode("Which digit is left?", bos=True)], max_new_tokens=4)
      >>> session.decode(4)  # without a picture, the model has nothing to say
      [[1]]
    """

    def __init__(
        self,
        model: Gemma,
        batch: int,
        max_len: int,
        *,
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        seeds: int | Sequence[int] = 0,
        stop_ids: Sequence[int] = (),
        chunk: int = CHUNK,
        propose: Propose | None = None,
        allow: Allow | None = None,
        logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
    ):
        cfg = model.cfg
        if max_len > cfg.max_positions:
            raise ValueError(
                f"{max_len} tokens asked for, but the context holds max_positions="
                f"{cfg.max_positions}; shorten the prompt or ask for fewer new tokens"
            )
        self.model, self.chunk, self.propose, self.allow = model, chunk, propose, allow
        self._processors = as_processors(logits_processors)
        self._advance_plainly = StoredProgram(advance, like=1)
        self._modalities = modalities_of(cfg)
        self.max_len = min(bucket(max_len), cfg.max_positions)
        self.chosen: list[list[int]] = [[] for _ in range(batch)]  # since the row's last `prefill`
        self.log_probs: list[list[float]] = [[] for _ in range(batch)]
        self.stop_ids = [tuple(int(i) for i in stop_ids)] * batch
        self._lengths = [0] * batch  # tokens read, and chosen before the last prompt
        self._limits = [0] * batch
        self._sampling = _per_row(sampling, batch, "sampling values")
        seed_B = _seeds(seeds, batch)
        self._state = empty_state(
            np.array(seed_B, np.uint32),
            self._sampling_rows(self._sampling),
            padded(self.stop_ids),
            cfg=cfg,
            layer_groups=model.layer_groups,
            max_len=self.max_len,
            dtype=model.runtime.kv_dtype,
            slack=self._slack,
            partition=model.runtime.partition,
        )
        if propose is not None:
            self._state = replace(self._state, drafts=propose.start(batch, self.max_len))
        if self._processors:
            text_BS = np.full((batch, self.max_len), -1, np.int32)
            self._state = replace(self._state, text_BS=text_BS)

    def prefill(
        self,
        rows: Sequence[Sequence[int] | None],
        *,
        max_new_tokens: int,
        soft: Sequence[Sequence[jax.Array] | jax.Array | None] | None = None,
        run: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Appends tokens to rows and chooses the first new token of each.

        Args:
          rows: Token ids per row, at least one each; in `[0, V)`, or placeholders. `None`
            leaves a row as it is.
          max_new_tokens: Room to make for new tokens until the next `prefill`.
          soft: Per row the soft tokens `[T, D]` of each of its items, in the order of the text, or
            `None`: as many as there are placeholders.
          run: Goes on in the same compiled program until `max_new_tokens` are chosen.
          progress: Called after each pass with tokens read so far and in total.
        """
        prompts = self._prompts(rows, soft or [None] * len(rows), max_new_tokens)
        self._make_room(prompts, max_new_tokens)
        for i, prompt in enumerate(prompts):
            if prompt is not None:
                self._lengths[i] = prompt.start + len(prompt.ids)
                self.chosen[i], self.log_probs[i], self._limits[i] = [], [], 0
        cuts = [[] if prompt is None else prompt.cuts(self.chunk) for prompt in prompts]
        passes = max(len(row_cuts) for row_cuts in cuts)
        for n in range(passes):
            # A row with fewer pieces than others waits at its end.
            parts = [row_cuts[n] if n < len(row_cuts) else None for row_cuts in cuts]
            if loop := run and n == passes - 1:
                self._limit([max_new_tokens if p else old for p, old in zip(prompts, self._limits)])
            self._advance(prefill_chunk(prompts, parts), loop=loop)
            if progress is not None:
                done = [row_cuts[min(n, len(row_cuts) - 1)].stop for row_cuts in cuts if row_cuts]
                progress(max(done), max(len(p.ids) for p in prompts if p is not None))

    def decode(self, limit: int | Sequence[int]) -> list[list[int]]:
        """Continues until `limit` tokens are chosen since a row's last `prefill`, or it stopped.

        Args:
          limit: For all rows, or one per row.

        Returns:
          The tokens chosen since the row's last `prefill`, per row, stop token included.
        """
        self._limit(_per_row(limit, len(self.chosen), "limits"))
        if np.any(
            ~np.asarray(self._state.done_B) & (np.asarray(self._state.step_B) < self._limits)
        ):
            self._advance(None, loop=True)
        # Drafts may have brought more; that waits for the next call.
        counts = np.minimum(np.asarray(self._state.step_B), self._limits)
        tokens_BX, log_probs_BX = np.asarray(self._state.tokens_BX), self._state.log_probs_BX
        self.chosen = [row[:n].tolist() for row, n in zip(tokens_BX, counts)]
        self.log_probs = [row[:n].tolist() for row, n in zip(np.asarray(log_probs_BX), counts)]
        return self.chosen

    def stop(self, row: int) -> None:
        """Ends a row from outside, after a stop text for example."""
        self._state = replace(self._state, done_B=self._state.done_B.at[row].set(True))

    def clear(
        self,
        row: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        """Empties a row, for the next `prefill` to start another text in it.

        Args:
          sampling, stop_ids: Of that text; default: what the row had.
          seed: Of that text.
        """
        empty_B = np.arange(len(self.chosen)) == row
        self._state = emptied(
            self._state,
            empty_B,
            np.where(empty_B, _seeds(seed, 1)[0], 0).astype(np.uint32),
            partition=self.model.runtime.partition,
        )
        self.chosen[row], self.log_probs[row] = [], []
        self._lengths[row] = self._limits[row] = 0
        if stop_ids is not None:
            self.stop_ids[row] = tuple(int(i) for i in stop_ids)
            self._state = replace(self._state, stop_ids_BI=padded(self.stop_ids))
        if sampling is not None:
            self.sample_by(row, sampling)

    def sample_by(self, row: int, sampling: Sampling) -> None:
        """Changes how the next tokens of a row are chosen.

        Raises:
          ValueError: A penalty with drafts, or the first one of the session for a row
            that has a text already, of which it would know nothing.
        """
        each = [sampling if i == row else old for i, old in enumerate(self._sampling)]
        rows, shape = self._sampling_rows(each), (len(each), self.model.cfg.vocab_size)
        seen_BV, counts_BV = self._state.seen_BV, self._state.counts_BV
        first = (rows.penalty and seen_BV is None) or (rows.counts and counts_BV is None)
        if first and self._lengths[row]:
            raise ValueError("a penalty on tokens cannot begin in the middle of a text")
        if rows.penalty and seen_BV is None:
            seen_BV = np.zeros(shape, bool)
        if rows.counts and counts_BV is None:
            counts_BV = np.zeros(shape, np.int32)
        self._sampling = each
        self._state = replace(self._state, sampling=rows, seen_BV=seen_BV, counts_BV=counts_BV)

    @property
    def done(self) -> list[bool]:
        """Rows that met a stop id, were stopped, or are empty."""
        within_B = np.asarray(self._state.step_B) <= self._limits
        return (np.asarray(self._state.done_B) & within_B).tolist()

    @property
    def room(self) -> int:
        """Tokens that still fit into the longest row."""
        return self.max_len - max(n + len(new) for n, new in zip(self._lengths, self.chosen))

    @property
    def proposed(self) -> list[int]:
        """Drafts made since each row was empty; 0 without speculation."""
        return [0] * len(self.chosen)

    @property
    def accepted(self) -> list[int]:
        """Drafts kept since each row was empty; 0 without speculation."""
        return [0] * len(self.chosen)

    @property
    def _slack(self) -> int:
        return 0 if self.propose is None else self.propose.count

    def _sampling_rows(self, each: Sequence[Sampling]) -> SamplingRows:
        rows = SamplingRows.of(each, self.model.cfg.vocab_size)
        if self.propose is not None and (rows.penalty or rows.counts):
            kind = "repetition penalty" if rows.penalty else "presence or frequency penalty"
            raise ValueError(f"speculation knows no {kind}; leave one of the two out")
        return rows

    def _limit(self, limits: Sequence[int]) -> None:
        self._limits = list(limits)
        self._state = replace(self._state, limit_B=np.array(self._limits, np.int32))

    def _advance(self, prompt: PrefillChunk | None, *, loop: bool) -> None:
        if not (self.propose or self.allow or self._processors):
            self._state = self._advance_plainly(self.model, self._state, prompt, loop=loop)
            return
        self._state = advance(
            self.model,
            self._state,
            prompt,
            loop=loop,
            propose=self.propose,
            allow=self.allow,
            processors=self._processors,
        )

    def _prompts(
        self,
        rows: Sequence[Sequence[int] | None],
        soft: Sequence[Sequence[jax.Array] | jax.Array | None],
        max_new_tokens: int,
    ) -> list[PromptRow | None]:
        """What to read into each row, and from which position on."""
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens=} must be at least 1")
        if all(row is None for row in rows):
            raise ValueError("no text for any row; give at least one")
        prompts = []
        for i, (row, items, old) in enumerate(zip(rows, soft, self.chosen, strict=True)):
            if row is None:
                prompts.append(None)
                continue
            # The last token chosen was never fed to the model: it goes in front of the new ones,
            # unless it is a stop token, which ends a text and is not part of it.
            pending = [token for token in old[-1:] if token not in self.stop_ids[i]]
            start = self._lengths[i] + max(len(old) - 1, 0)
            ids = pending + list(row)
            self._check(i, ids, start, max_new_tokens)
            prompts.append(PromptRow.of(ids, start, items, self._modalities, written=len(pending)))
        return prompts

    def _check(self, i: int, ids: list[int], start: int, max_new_tokens: int) -> None:
        vocab = self.model.cfg.vocab_size
        allowed = {modality.placeholder for modality in self._modalities}
        if not ids:
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if min(ids) < 0 or max(set(ids) - allowed, default=0) >= vocab:
            raise ValueError(f"prompt {i} has ids outside [0, {vocab}), the model's vocabulary")
        if (need := start + len(ids) + max_new_tokens) > self.max_len:
            raise ValueError(
                f"{need} tokens needed ({start + len(ids)} of text, {max_new_tokens} new), but "
                f"the session holds max_len={self.max_len}; shorten the text or make room"
            )

    def _make_room(self, prompts: list[PromptRow | None], max_new_tokens: int) -> None:
        """Columns for new tokens; and caches that end where the prompts begin."""
        state, batch = self._state, len(prompts)
        width, old = bucket(max_new_tokens + self._slack), state.tokens_BX.shape[1]
        tokens_BX = np.full((batch, width), -1, np.int32)
        log_probs_BX = np.zeros((batch, width), np.float32)
        if None in prompts:  # a row that goes on keeps what it has
            width = max(width, old)
            tokens_BX, log_probs_BX = (
                np.pad(a, ((0, 0), (0, width - old)), constant_values=fill)
                for a, fill in ((state.tokens_BX, -1), (state.log_probs_BX, 0))
            )
        self._state = replace(state, tokens_BX=tokens_BX, log_probs_BX=log_probs_BX)
        if self.propose is not None and any(p is not None and p.start for p in prompts):
            # In the turn before, drafts may have brought more than was asked for.
            starts = [self.max_len if p is None else p.start for p in prompts]
            partition = self.model.runtime.partition
            self._state = rewound(self._state, np.array(starts, np.int32), partition=partition)


def _seeds(seeds, batch: int) -> list[int]:
    """One seed per row, in the range of uint32."""
    try:
        one = () == np.shape(seeds)
        rows = [seeds] * batch if one else _per_row(seeds, batch, "seeds")
        return [operator.index(seed) % 2**32 for seed in rows]
    except TypeError:
        raise ValueError(
            f"a seed must be an integer, or one integer per prompt, got {type(seeds).__name__}"
        ) from None


def _per_row(value, batch: int, name: str) -> list:
    """One value for all rows, or one per row, as one per row."""
    if isinstance(value, (int, np.integer, Sampling)):
        return [value] * batch
    if len(value) != batch:
        raise ValueError(f"{len(value)} {name} for {batch} prompts; give one, or one per prompt")
    return list(value)


def padded(stop_ids: Sequence[Sequence[int]]) -> np.ndarray:
    """`[B, I]` int32, filled up with -1; for the usual two or so ids the same shape."""
    ids_BI = np.full((len(stop_ids), max(4, *map(len, stop_ids))), -1, np.int32)
    for row, ids in zip(ids_BI, stop_ids):
        row[: len(ids)] = ids
    return ids_BI
