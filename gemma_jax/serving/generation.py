"""What an engine writes for one HTTP request, between its thread and the loop of the server."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import anyio

from gemma_jax.inference.requests import Full, Piece, Request, Ticket
from gemma_jax.serving.errors import failed, refused, too_many, unavailable
from gemma_jax.serving.served import Served
from gemma_jax.serving.text_track import Part, PromptTrack, TextTrack

PATIENCE = 60.0  # seconds beyond its deadline after which an engine is given up


@dataclass
class Usage:
    """Tokens of one HTTP request, and when they came.

    Attributes:
      begun, first, last: By `time.monotonic()`; 0 before.
      gaps: Seconds between tokens of one answer.
    """

    prompt: int = 0
    cached: int = 0
    new: int = 0
    begun: float = 0.0
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def body(self) -> dict:
        """As the API tells of it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Generation:
    """The answers to one HTTP request, part by part.

    What comes in while nobody asks waits, and is told at once when somebody does: a slow reader
    costs no more memory than its answers.
    """

    def __init__(
        self,
        served: Served,
        requests: Sequence[Request],
        stops: Sequence[str],
        shown: Sequence[str] = (),
    ):
        self._served, self._requests = served, requests
        self._tracks = [
            TextTrack(i, served.tokenizer, stops, one.stop_ids, shown, one.prompt_log_probs)
            for i, one in enumerate(requests)
        ]
        self._prompts = [
            PromptTrack(served.tokenizer, one.prompt.token_ids) if one.prompt_log_probs else None
            for one in requests
        ]
        self._arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}
        self._last: dict[int, float] = {}  # when each answer had its last piece
        self._open, self._cancelled, self._lock = set(range(len(requests))), False, threading.Lock()
        self.usage = Usage(begun=time.monotonic())

    async def start(self) -> None:
        """Hands all requests to the engine.

        Raises:
          ApiError: The engine is full, or refuses one; then none of them runs.
        """
        loop = asyncio.get_running_loop()
        try:
            for i in range(len(self._requests)):
                await anyio.to_thread.run_sync(self._submit, i, loop)
        except BaseException as error:
            self.cancel()
            if isinstance(error, Full):
                raise too_many(str(error), error.retry_after, "engine_full") from None
            if isinstance(error, ValueError):
                raise refused(str(error)) from None
            if isinstance(error, RuntimeError):  # an engine that is closing
                raise unavailable(str(error)) from None
            raise

    def _submit(self, i: int, loop: asyncio.AbstractEventLoop) -> None:
        def on_piece(piece: Piece) -> None:
            try:
                loop.call_soon_threadsafe(self._arrived.put_nowait, (i, piece))
            except RuntimeError:  # the loop has ended, and so has who asked
                pass

        ticket = self._served.engine.submit(self._requests[i], on_piece)
        with self._lock:
            self._tickets[i] = ticket
            cancelled = self._cancelled
        if cancelled:  # while the engine was thinking about it
            ticket.cancel()

    def cancel(self) -> None:
        """Frees whatever still runs; may be called at any time, and again."""
        with self._lock:
            self._cancelled = True
            tickets = [ticket for i, ticket in self._tickets.items() if i in self._open]
        for ticket in tickets:
            ticket.cancel()

    def stop(self, index: int) -> None:
        """Ends one answer, whose parts so far are all of it."""
        if index in self._open:
            self._open.discard(index)
            self._tickets[index].cancel()
            self.usage.reasons.append("stop")

    async def parts(self) -> AsyncIterator[Part]:
        """Parts of all answers as they come; the last part of each has its reason.

        Raises:
          ApiError: The engine failed, or was ended.
        """
        deadline = max((r.deadline for r in self._requests if r.deadline is not None), default=None)
        try:
            while self._open:
                i, piece = await self._next(deadline)
                if i in self._open and (part := self._read(i, piece)) is not None:
                    yield part
        finally:
            self.cancel()

    async def _next(self, deadline: float | None) -> tuple[int, Piece]:
        left = None if deadline is None else deadline + PATIENCE - time.monotonic()
        try:
            async with asyncio.timeout(left):
                return await self._arrived.get()
        except TimeoutError:
            raise failed("the engine did not answer in time", 504) from None

    def _read(self, i: int, piece: Piece) -> Part | None:
        track, reason = self._tracks[i], piece.finish_reason
        self._count(i, piece)
        if piece.refused:
            raise refused(piece.error, code="constraint_failed")
        if reason == "error":
            raise failed(piece.error or "the engine failed")
        part, prompt = track.push(piece), self._prompts[i]
        if prompt is not None:
            part = replace(part, prompt=prompt.push(piece))
        if track.stopped and reason is None:
            self._tickets[i].cancel()
        elif reason == "cancelled" and not track.stopped:
            raise unavailable("the server is shutting down")
        elif reason is None:
            return part if part.text or part.tokens or part.prompt else None
        self._open.discard(i)
        # What a deadline cuts off is too long, to clients.
        end = track.close("length" if reason == "deadline" else reason or "stop")
        self.usage.reasons.append(end.finish_reason or "")
        return replace(
            end, text=part.text + end.text, tokens=part.tokens + end.tokens, prompt=part.prompt
        )

    def _count(self, i: int, piece: Piece) -> None:
        now, usage = time.monotonic(), self.usage
        if piece.token_ids:
            usage.first = usage.first or now
            if i in self._last:
                gap = (now - self._last[i]) / len(piece.token_ids)
                usage.gaps += [gap] * len(piece.token_ids)
            self._last[i] = usage.last = now
        usage.new = sum(track.count for track in self._tracks)

    def finish(self) -> Usage:
        """The usage, all told."""
        firsts = self._firsts()  # answers to one prompt share it
        self.usage.prompt = sum(len(self._requests[i].prompt.token_ids) for i in firsts)
        self.usage.cached = sum(
            self._tickets[i].cached_tokens for i in firsts if i in self._tickets
        )
        self.usage.new = sum(track.count for track in self._tracks)
        return self.usage

    def _firsts(self) -> list[int]:
        """The first answer to each prompt."""
        seen: dict[int, int] = {}
        for i, request in enumerate(self._requests):
            seen.setdefault(id(request.prompt), i)
        return list(seen.values())
