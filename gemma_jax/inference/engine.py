"""Continuous batching: many requests share one model, each in a slot of its own.

In each round prompts are read, chunk by chunk, for half as long as the burst before took, and then
every slot writes a burst of tokens: so nobody who writes waits for more than that and one chunk,
however many and long the prompts of others are, and slots do not stay empty for long.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.admission import check_request
from gemma_jax.inference.lookup import Lookup, NextTokens, next_tokens
from gemma_jax.inference.prefill import PromptRow, bucket
from gemma_jax.inference.prefix_cache import PrefixCache
from gemma_jax.inference.requests import FinishReason, Full, OnPiece, Piece, Request
from gemma_jax.inference.scheduler import FairQueue
from gemma_jax.inference.slots import Slots, every_rules
from gemma_jax.inference.work import Counters, Work
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import encode_prompt

FORCED = 4  # tokens without a choice that are read in one pass, where nothing else is drafted


class Engine:
    """Serves many requests at a time with one model; each text is what it would be alone.

    Args:
      model: The model to run. With several adapters beside it, each request may name its own.
      slots: How many requests write at the same time.
      context: Longest sequence in tokens, prompt and continuation.
      chunk: Longest stretch of prompt read between two bursts; longer for models
        whose soft tokens see each other in longer blocks.
      burst: Most tokens per slot that one call of the device chooses.
      queue: How many requests may wait.
      budget: Most tokens, prompts and room for new ones, of all requests taken; `None`: as the
        queue allows.
      prefix_bytes: Memory of the host for what was read of prompts, for others that begin alike;
        0: nothing is kept. What is kept is the end of each chunk.
      threads: For the masks of constraints.
      speculation: Drafts tokens that are checked several at once: a text is the same with any
        drafts, at any temperature. Wants a little more memory for each row.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> engine = gj.Engine(model, slots=2, context=64, chunk=16)
      >>> ids, pieces = tok.encode("Which digit is left?", bos=True), []
      >>> request = gj.Request(
      ...     prompt=gj.Prompt(ids), max_new_tokens=4, stop_ids=tuple(tok.stop_ids)
      ... )
      >>> ticket = engine.submit(request, pieces.append)
      >>> while engine.step():
      ...     pass
      >>> pieces[-1].token_ids, pieces[-1].finish_reason
      ([1], 'stop')
    """

    def __init__(
        self,
        model: Gemma,
        *,
        slots: int = 8,
        context: int = 4096,
        chunk: int = 256,
        burst: int = 4,
        queue: int = 256,
        budget: int | None = None,
        prefix_bytes: int = 0,
        threads: int = 2,
        speculation: Lookup | None = None,
    ):
        for name, value in dict(slots=slots, context=context, chunk=chunk, burst=burst).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._modalities = modalities_of(model.cfg)
        blocks = [m.tokens_per_item or 0 for m in self._modalities if m.bidirectional]
        self._speculation = speculation
        slack = 0 if speculation is None else speculation.draft_tokens
        self._slots = Slots(
            model,
            slots,
            context,
            max([chunk, *blocks]),
            burst,
            drafts=slack or FORCED,
            slack=slack,
        )
        self._queue_bound, self._budget = queue, budget
        self._prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
        self._queue: FairQueue[Work] = FairQueue()
        self._running: dict[int, Work] = {}
        self._reading: Work | None = None
        self._change = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._closing = self._draining = False
        self._last_burst = 0.0  # seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="masks")
        self._counters, self._seconds = Counters(), deque([1.0], maxlen=64)

    @property
    def model(self) -> Gemma:
        return self._slots.model

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        return self._slots.context

    def submit(self, request: Request, on_piece: OnPiece) -> Work:
        """Takes a request; safe from any thread.

        Args:
          on_piece: Is told the answer piece by piece, from the engine's thread; where it raises,
            its request ends.

        Returns:
          A `Ticket`.

        Raises:
          ValueError: Something that no waiting would help: ids outside the vocabulary, more tokens
            than the context holds, an adapter that there is not.
          Full: Too many wait, or the engine is to stop.
        """
        check_request(request, self.model, self.context, self._modalities)
        work = Work(request, on_piece, self._notify)
        with self._change:
            if self._closing or self._draining:
                raise Full("the engine takes no more requests: it is about to stop", 5.0)
            if len(self._queue) >= self._queue_bound:
                raise Full(f"{len(self._queue)} requests wait already", self._retry_after())
            used = self._tokens_in_use()
            if self._budget is not None and used + work.tokens > self._budget:
                raise Full(
                    f"{work.tokens} tokens asked for, and {used} of a budget of {self._budget} are "
                    "taken",
                    self._retry_after(),
                )
            self._queue.put(request.owner, work)
            self._change.notify_all()
        return work

    def start(self) -> None:
        """Runs in a thread of its own from now on."""
        with self._change:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Takes no more requests, and waits until all that were taken have ended.

        Returns:
          Whether they have, in this time.
        """
        with self._change:
            self._draining = True
            self._change.notify_all()
            return self._change.wait_for(lambda: not self._all(), seconds)

    def close(self) -> None:
        """Stops; requests that have not ended are told so, as `"cancelled"`."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for work in self._all():
            self._end(work, "cancelled")
        self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self) -> bool:
        """One round: some chunks of prompts, and a burst of tokens in every slot.

        Returns:
          Whether there is more to do.
        """
        self._sweep()
        until = time.monotonic() + self._last_burst / 2
        while self._read() and (not self._running or time.monotonic() < until):
            self._sweep()
        if self._running:
            began = time.monotonic()
            self._write()
            self._last_burst = time.monotonic() - began
        with self._change:
            return bool(self._all())

    def programs(self, *, prompt_log_probs: bool = False) -> list[str]:
        """Names of the programs that serve everything; see `warm_up`."""
        return [name for name, _ in self._warm_ups(prompt_log_probs)]

    def warm_up(
        self,
        progress: Callable[[str], None] | None = None,
        *,
        prompt_log_probs: bool = False,
    ) -> None:
        """Makes all programs ahead, while nothing runs; those of encoders come when needed.

        Args:
          progress: Is told the name of each before it is made.
          prompt_log_probs: Whether to make those for log-probabilities of prompts too, one more
            for each width of a chunk of text; else they come when needed.

        Raises:
          ValueError: Requests are on their way.
        """
        with self._change:
            if self._all():
                raise ValueError("an engine warms up while nothing runs; do it before start")
        for name, make in self._warm_ups(prompt_log_probs):
            if progress is not None:
                progress(name)
            make()

    def stats(self) -> Mapping[str, object]:
        """Numbers for metrics: what is going on, totals, delays in seconds since the last call."""
        with self._change:
            counters = self._counters
            out = dict(
                running=len(self._running) + (self._reading is not None),
                waiting=len(self._queue),
                slots=self._slots.count,
                tokens_in_use=self._tokens_in_use(),
                budget=self._budget,
                prompt_tokens=counters.prompt_tokens,
                generated_tokens=counters.generated_tokens,
                cached_tokens=counters.cached_tokens,
                drafted_tokens=counters.drafted_tokens,
                kept_tokens=counters.kept_tokens,
                finished=dict(counters.finished),
            )
            for name in ("queue_seconds", "first_token_seconds", "inter_token_seconds"):
                out[name] = list(getattr(counters, name))
                getattr(counters, name).clear()
            return out

    def _warm_ups(self, prompt_log_probs: bool) -> list[tuple[str, Callable[[], None]]]:
        slots, width, out = self._slots, 16, []
        widths = [width]
        while width < slots.chunk:
            width = bucket(width + 1)
            widths.append(width)
        for soft in (False, True) if self._modalities else (False,):
            for width in widths:
                name = f"read {width}" + (", soft tokens" if soft else "")
                out.append((name, lambda w=width, s=soft: slots.reader.warm_up(w, s)))
        for width in widths if prompt_log_probs else ():
            name = f"read {width}, log-probabilities"
            out.append((name, lambda w=width: slots.reader.warm_up_scored(w)))
        out.append(("clear", slots.reader.clear))
        if self._prefixes is not None:
            out.append(("snapshot", lambda: slots.reader.snapshot(slice(0, 1))))
        out.append(("insert", lambda: slots.insert(0, 0, 0, [])))
        out.append(("move", lambda: slots.move(0, 0)))
        for rules in every_rules(self._speculation is not None):
            for n in slots.widths(rules):
                out.append((f"{rules}, {n} rows", lambda r=rules, n=n: slots.warm_up(r, n)))
        return out

    def _run(self) -> None:
        while not self._closing:
            if not self.step():
                with self._change:
                    self._change.wait_for(lambda: self._closing or self._all())

    def _notify(self) -> None:
        with self._change:
            self._change.notify_all()

    def _all(self) -> list[Work]:
        reading = [] if self._reading is None else [self._reading]
        return [*reading, *self._running.values(), *self._queue]

    def _tokens_in_use(self) -> int:
        return sum(work.tokens for work in self._all())

    def _retry_after(self) -> float:
        """Until a slot is likely to be free, from how long the last requests took."""
        mean = sum(self._seconds) / len(self._seconds)
        return float(np.clip(mean * (1 + len(self._queue)) / self._slots.count, 1, 60))

    def _sweep(self) -> None:
        """Ends what was cancelled or is late, wherever it is."""
        with self._change:
            works = [work for work in self._all() if work.cancelled or work.late()]
        for work in works:
            self._end(work, "cancelled" if work.cancelled else "deadline")

    def _end(self, work: Work, reason: FinishReason, error: str = "", **rest) -> None:
        with self._change:
            if work.ended:
                return
            work.ended = True
            self._queue.remove(lambda other: other is work)
            self._running = {s: other for s, other in self._running.items() if other is not work}
            if self._reading is work:
                self._reading = None
            finished = self._counters.finished
            finished[reason] = finished.get(reason, 0) + 1
            self._seconds.append(time.monotonic() - work.arrived)
            self._change.notify_all()
        self._tell(work, Piece(finish_reason=reason, error=error, **rest))

    def _refuse(self, work: Work, error: Exception) -> None:
        self._end(work, "error", f"the constraint failed: {error}", refused=True)

    def _tell(self, work: Work, piece: Piece) -> None:
        try:
            work.on_piece(piece)
        except Exception:  # whoever listens has gone: nobody else is to suffer
            work.cancelled = True

    def _read(self) -> bool:
        """Reads one chunk, of a prompt that begins once a slot is free; whether there was one."""
        with self._change:
            if self._reading is None:
                if not len(self._queue) or len(self._running) == self._slots.count:
                    return False
                self._reading = self._queue.take()
        work = self._reading
        try:
            if work.row is None:
                self._begin(work)
            if work.parts:
                part = work.parts.pop(0)
                self._read_part(work, part)
                self._keep(work, part)
            if work.parts:
                return True
        except Exception as error:
            self._fail([work], error)
            return True
        try:
            self._insert(work)
        except Exception as error:
            self._fail([work, *self._running.values()], error)
        return True

    def _read_part(self, work: Work, part: slice) -> None:
        request, reader = work.request, self._slots.reader
        if not request.prompt_log_probs:
            reader.read(work.row, part, request.adapter)
            return
        next_ids = request.prompt.token_ids[part.start + 1 : part.stop + 1]
        scores = reader.read_scored(work.row, part, request.adapter, next_ids)
        log_probs, best = scores.told(len(next_ids), request.top_log_probs)
        self._tell(work, Piece(prompt_log_probs=log_probs, prompt_top_log_probs=best))

    def _begin(self, work: Work) -> None:
        prompt = work.request.prompt
        self._counters.queue_seconds.append(time.monotonic() - work.arrived)
        soft = encode_prompt(self.model, prompt, self._modalities) if self._modalities else None
        self._slots.reader.clear()
        work.row = PromptRow.of(prompt.token_ids[:-1], 0, soft, self._modalities)
        work.parts = work.row.cuts(self._slots.chunk)
        if self._prefixes is not None and work.reuses:
            parts = [part for part in work.parts if self._may_keep(work, part)]
            work.chain = self._prefixes.find(work.row, parts, work.request.adapter)
            if work.chain:
                self._slots.reader.restore(work.chain)
                work.cached_tokens = work.chain[-1].stop
                work.parts = work.parts[len(work.chain) :]

    def _may_keep(self, work: Work, part: slice) -> bool:
        """Whether the part is read in the same program by all prompts that have it."""
        return part.stop < len(work.row.ids) or part.stop - part.start == self._slots.chunk

    def _keep(self, work: Work, part: slice) -> None:
        whole = not work.chain or work.chain[-1].stop == part.start
        known = whole and (work.chain or part.start == 0)
        if self._prefixes is None or not (work.reuses and known):
            return
        if self._may_keep(work, part):
            arrays = self._slots.reader.snapshot(part)
            new = self._prefixes.put(work.row, part, work.request.adapter, work.chain, arrays)
            work.chain += [] if new is None else [new]

    def _insert(self, work: Work) -> None:
        with self._change:
            self._counters.prompt_tokens += work.prompt_tokens
            self._counters.cached_tokens += work.cached_tokens
        if not work.left:  # the prompt was all
            self._end(work, "length")
            return
        ids = work.request.prompt.token_ids
        slot = next(s for s in range(self._slots.count) if s not in self._running)
        self._slots.insert(slot, ids[-1], work.request.seed, ids)
        with self._change:
            self._running[slot], self._reading = work, None
        self._look_ahead(work)

    def _look_ahead(self, work: Work) -> None:
        if (constraint := work.request.constraint) is not None:
            width = min(self._slots.drafts, work.left - 1)
            lookup = self._speculation if work.patience.drafts_at(work.count) else None
            work.next = self._pool.submit(next_tokens, constraint, width, self._text(work), lookup)

    def _text(self, work: Work) -> np.ndarray:
        """What drafts may be looked up in."""
        ids = work.text
        media = [modality.placeholder for modality in self._modalities]
        return np.where(np.isin(ids, media), -1, ids) if media else ids

    def _fail(self, works: list[Work], error: Exception) -> None:
        """Ends requests that a failure of the device took along; those beside them go on."""
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        lost = bool(set(works) & set(self._running.values()))
        for work in works:
            self._end(work, "error", reason)
        if lost or not self._running:
            self._slots.reset()
        else:
            self._slots.reader.reset()

    def _write(self) -> None:
        try:
            places = self._slots.close_ranks({s: w.request for s, w in self._running.items()})
            with self._change:
                self._running = {places[slot]: work for slot, work in self._running.items()}
            nexts = self._nexts()
            free = {slot: work for slot, work in self._running.items() if work.next is None}
            burst = self._slots.burst if len(free) > len(nexts) else 1
            limits = {slot: min(burst, work.left) for slot, work in free.items()}
            limits |= dict.fromkeys(nexts, 1)
            if not limits:
                return
            drafts = {slot: n.drafts for slot, n in nexts.items()}
            if self._speculation is not None:
                for slot, work in free.items():
                    if work.patience.drafts_at(work.count):
                        drafts[slot] = self._speculation.drafts(self._text(work))[: work.left - 1]
            requests = {slot: work.request for slot, work in self._running.items()}
            masks = {slot: n.masks for slot, n in nexts.items()}
            out = self._slots.write(requests, limits, masks, drafts)
        except Exception as error:
            self._fail(list(self._running.values()), error)
            return
        for slot, work in list(self._running.items()):
            if slot in limits:
                forced = nexts[slot].forced if slot in nexts else 0
                self._count(work, drafts.get(slot, []), forced, out.tokens[slot])
                self._collect(work, out.tokens[slot], out.log_probs[slot], out.best[slot])

    def _nexts(self) -> dict[int, NextTokens]:
        """Masks that are there; where nobody else writes, the first is waited for."""
        waiting = {slot: work for slot, work in self._running.items() if work.next is not None}
        nexts = {}
        for slot, work in waiting.items():
            alone = not nexts and len(waiting) == len(self._running)
            if alone or work.next.done():
                try:
                    nexts[slot] = work.next.result()
                except Exception as error:
                    self._refuse(work, error)
        return nexts

    def _count(self, work: Work, drafts: list[int], forced: int, ids: list[int]) -> None:
        kept = [*(draft == own for draft, own in zip(drafts, ids)), False].index(False)
        work.patience.saw(len(drafts) - forced, max(kept - forced, 0), work.count + len(ids))
        with self._change:
            self._counters.drafted_tokens += len(drafts)
            self._counters.kept_tokens += kept

    def _collect(self, work: Work, ids: list[int], log_probs: list[float], best: list) -> None:
        """Tells of new tokens, and ends what they end."""
        if work.cancelled:
            self._end(work, "cancelled")
            return
        try:
            ids, ended = work.until_end(ids)
        except Exception as error:
            self._refuse(work, error)
            return
        now, first = time.monotonic(), work.count == 0
        work.chose(ids)
        with self._change:
            self._counters.generated_tokens += len(ids)
            if first and ids:
                self._counters.first_token_seconds.append(now - work.arrived)
            elif ids:
                # They were chosen one after another, all the time.
                self._counters.inter_token_seconds.extend([(now - work.told) / len(ids)] * len(ids))
        work.told = now
        tokens = dict(
            token_ids=ids, log_probs=log_probs[: len(ids)], top_log_probs=best[: len(ids)]
        )
        if ended or not work.left:
            self._end(work, "stop" if ended else "length", **tokens)
            return
        self._tell(work, Piece(**tokens))
        self._look_ahead(work)
