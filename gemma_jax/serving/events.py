"""Answers that are sent while they are made, and clients that leave before they are done."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gemma_jax.serving.errors import ApiError, failed

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ClientGoneError(Exception):
    """Says that nobody waits for the answer any more."""


def dumps(value: Any) -> bytes:
    """JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dumps(value) + b"\n\n"


class JSON(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine) -> Any:
    """What `work` returns; it is ended if the client leaves before.

    Raises:
      ClientGoneError: The client left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watcher.cancel()
        await _ended(task)


async def _ended(task: asyncio.Task) -> None:
    """Cancels a task and waits until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # is told of elsewhere, or to nobody


class EventStream(Response):
    """Sends events as they come; ends when they do, when the client leaves, or reads nothing.

    Attributes:
      write_seconds: How long a client may take for one of them.
      close: Called at the end, whichever it is, with the outcome: `"done"`, `"error"`, `"gone"`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], write_seconds: float, close):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._seconds, self._close = events, write_seconds, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send_all(send))
        watcher = asyncio.ensure_future(gone(receive))
        outcome = "gone"
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                outcome = task.result()
        except TimeoutError:  # the client does not read
            outcome = "gone"
        finally:
            watcher.cancel()
            await _ended(task)
            self._close(outcome)

    async def _send_all(self, send: Send) -> str:
        outcome = "done"
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        try:
            async for data in self._events:
                await self._send(send, _body(data, more=True))
        except ApiError as error:
            outcome = "error"
            await self._send(send, _body(event(error.body), more=True))
        except (TimeoutError, asyncio.CancelledError):
            raise
        except Exception:
            outcome = "error"
            await self._send(send, _body(event(failed("the answer broke off").body), more=True))
        finally:
            await self._events.aclose()
        await self._send(send, _body(b"", more=False))
        return outcome

    async def _send(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._seconds):
            await send(message)


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
