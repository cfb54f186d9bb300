"""What the routes of one server share."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.requests import Request as HttpRequest

from gemma_jax.inference.requests import Request
from gemma_jax.serving.errors import ApiError, refused, unavailable
from gemma_jax.serving.fields import Fields, parse_json
from gemma_jax.serving.generation import Generation
from gemma_jax.serving.media import MediaReader
from gemma_jax.serving.metrics import Metrics
from gemma_jax.serving.served import Served

READERS = 4  # requests that are read at a time: pictures take memory


@dataclass
class State:
    """Holds the parts of a running server.

    Attributes:
      media_domains: Hosts that pictures may be fetched from.
      draining: No new work is taken: the server is about to end.
      running: Texts that are written, and vectors that are made.
    """

    served: Served
    metrics: Metrics
    media_domains: frozenset[str] = frozenset()
    draining: bool = False
    running: set[Generation | Future] = field(default_factory=set)
    _readers: anyio.CapacityLimiter | None = None

    def require_open(self) -> None:
        """Raises `ApiError`, a 503, if no new work is taken."""
        if self.draining:
            raise unavailable("the server is shutting down")

    def media(self) -> MediaReader:
        """For the pictures and sounds of one request."""
        return MediaReader(self.served.limits, self.media_domains)

    def deadline(self) -> float:
        return time.monotonic() + self.served.limits.seconds

    async def read(self, function, *arguments) -> Any:
        """Runs what takes time beside the loop; a `ValueError` of the library is a 400."""
        if self._readers is None:
            self._readers = anyio.CapacityLimiter(READERS)
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self._readers)
        except (ValueError, ImportError) as error:
            raise refused(str(error)) from None

    async def fields(self, http: HttpRequest) -> Fields:
        """The JSON object in the body of a request."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                f"expected Content-Type: application/json, got {kind!r:.80}",
                status=415,
                code="unsupported_media_type",
            )
        data = await http.body()
        return Fields(await self.read(parse_json, data, self.served.limits.depth))

    async def generation(
        self,
        http: HttpRequest,
        requests: Sequence[Request],
        stops: Sequence[str],
        shown: Sequence[str] = (),
    ) -> Generation:
        """Hands requests to the engine; for `shown` see `TextTrack`."""
        self.require_open()
        generation = Generation(self.served, requests, stops, shown)
        self.running.add(generation)
        try:
            await generation.start()
        except BaseException:
            self.running.discard(generation)
            raise
        return generation

    def ended(self, http: HttpRequest, generation: Generation) -> None:
        """Tells metrics and log of an answer that is done, however it ended."""
        generation.cancel()
        if generation not in self.running:
            return
        self.running.discard(generation)
        usage = generation.finish()
        self.metrics.answered(usage, http.state.owner)
        http.state.note.update(
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.new,
            finish=usage.reasons,
            first_token_s=round(usage.first - usage.begun, 4) if usage.first else None,
        )
