"""A server that ends well: told to stop, it first finishes what it has begun."""

import asyncio
import signal
import threading

import uvicorn
from starlette.applications import Starlette

from gemma_jax.serving.app import drain
from gemma_jax.serving.timed_heads import HEAD_SECONDS, TimedHeads


class Server(uvicorn.Server):
    """Runs an application until a signal comes, and then as long as its requests take.

    With the first SIGTERM or SIGINT, `/ready` and new work get a 503; requests that were accepted
    are finished within the grace. A second signal ends it at once.

    Args:
      grace: Seconds.
      head_seconds: In which the headers of a request have to arrive.
    """

    def __init__(
        self,
        app: Starlette,
        host: str,
        port: int,
        grace: float,
        connections: int = 1024,
        head_seconds: float = HEAD_SECONDS,
    ):
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=type("Heads", (TimedHeads,), {"head_seconds": head_seconds}),
            access_log=False,
            log_level="warning",
            lifespan="off",
            server_header=False,
            limit_concurrency=connections,
            timeout_graceful_shutdown=max(1, round(grace)),
        )
        super().__init__(config)
        self._application, self._grace, self._ending = app, grace, threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame) -> None:
        """What a signal does; see the class."""
        if self._ending.is_set() or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._ending.set()
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._end()))

    def end(self) -> None:
        """The same as a signal, for those in the same process."""
        self.handle_exit(signal.SIGTERM, None)

    async def _end(self) -> None:
        await drain(self._application, self._grace)
        self.should_exit = True
