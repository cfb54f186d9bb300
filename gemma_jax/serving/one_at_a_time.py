"""The plainest engine: a thread that answers one request after the other.

It keeps the contract of `inference.requests` and no more: nothing is batched, no beginning of a
prompt is kept, and what it cannot do (grammars, biases, the most probable tokens, adapters) it
refuses.
"""

import queue
import threading
import time
from dataclasses import dataclass

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.requests import FinishReason, Full, OnPiece, Piece, Request
from gemma_jax.inference.session import Session
from gemma_jax.multimodal.prompts import encode_prompt

BURST = 8  # tokens between two looks at the clock and at who has left
PATIENCE = 5.0  # seconds that who finds a full queue is told to wait


@dataclass
class _Job:
    """A request that was taken, and the ticket for it."""

    request: Request
    on_piece: OnPiece
    prompt_tokens: int
    cached_tokens: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class OneAtATime:
    """Answers requests in the order in which they come.

    Args:
      waiting: How many may wait; one more is refused.

    Examples:
      >>> import queue
      >>> import gemma_jax as gj
      >>> from gemma_jax.inference.requests import Request
      >>> model, tok = gj.load("checkpoints/digits")
      >>> engine, pieces = OneAtATime(model), queue.Queue()
      >>> engine.start()
      >>> prompt = gj.Prompt(tok.encode("Which digit is left?", bos=True))
      >>> request = Request(prompt=prompt, max_new_tokens=4, stop_ids=tok.stop_ids)
      >>> ticket = engine.submit(request, pieces.put)
      >>> pieces.get(timeout=60).token_ids
      [1]
      >>> engine.close()
    """

    def __init__(self, model: Gemma, *, waiting: int = 64):
        self._model = model
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._running: _Job | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def submit(self, request: Request, on_piece: OnPiece) -> _Job:
        """Takes a request; pieces are told of from the engine's thread.

        Raises:
          Full: So many wait already.
          ValueError: Something that this engine cannot do.
        """
        wanted = {
            "a grammar": request.constraint is not None,
            "logit_bias": bool(request.logit_bias),
            "top_logprobs": request.top_log_probs > 0,
            "an adapter": request.adapter is not None,
        }
        if names := [name for name, asked in wanted.items() if asked]:
            raise ValueError(f"{names[0]} is not available with the engine of this server")
        if self._closing.is_set():
            raise RuntimeError("the engine is closing")
        job = _Job(request, on_piece, len(request.prompt.token_ids))
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Full(f"{self._jobs.maxsize} requests wait already", PATIENCE) from None
        return job

    def close(self) -> None:
        """Ends what runs and waits as cancelled, and the thread."""
        self._closing.set()
        try:
            self._jobs.put_nowait(None)  # wakes the thread
        except queue.Full:
            pass
        self._thread.join()

    def stats(self) -> dict[str, float]:
        """How many are answered, and how many wait."""
        running = float(self._running is not None)
        return {"running": running, "waiting": self._jobs.qsize(), "cache_usage": running}

    def _work(self) -> None:
        while not self._closing.is_set():
            if (job := self._jobs.get()) is not None:
                self._running = job
                self._answer(job)
                self._running = None
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                job.on_piece(Piece(finish_reason="cancelled"))

    def _answer(self, job: _Job) -> None:
        try:
            self._write(job)
        except Exception as error:  # the next request shall be answered nevertheless
            message = f"{type(error).__name__}: {error}"
            job.on_piece(Piece(finish_reason="error", error=message[:500]))

    def _write(self, job: _Job) -> None:
        if (reason := self._ended(job)) is not None:
            job.on_piece(Piece(finish_reason=reason))
            return
        request, ids = job.request, job.request.prompt.token_ids
        session = Session(
            self._model,
            1,
            len(ids) + request.max_new_tokens,
            sampling=request.sampling,
            seeds=request.seed,
            stop_ids=request.stop_ids,
        )
        soft = encode_prompt(self._model, request.prompt)
        session.prefill([ids], soft=[soft], max_new_tokens=request.max_new_tokens)
        told, limit = 0, 1
        while True:
            chosen = session.decode(limit)[0]
            reason: FinishReason | None = "stop" if session.done[0] else self._ended(job)
            if reason is None and len(chosen) >= request.max_new_tokens:
                reason = "length"
            new, log_probs = chosen[told:], session.log_probs[0][told:]
            job.on_piece(Piece(token_ids=new, log_probs=log_probs, finish_reason=reason))
            if reason is not None:
                return
            told, limit = len(chosen), min(limit + BURST, request.max_new_tokens)

    def _ended(self, job: _Job) -> FinishReason | None:
        if job.cancelled or self._closing.is_set():
            return "cancelled"
        deadline = job.request.deadline
        return "deadline" if deadline is not None and time.monotonic() > deadline else None
