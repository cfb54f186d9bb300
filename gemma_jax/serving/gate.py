"""What every request passes: who it is, whether it may, how much it brings, and a line about it."""

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_jax.serving.auth import Keys
from gemma_jax.serving.errors import ApiError
from gemma_jax.serving.events import JSON, ClientGoneError
from gemma_jax.serving.limits import Limits, RateLimit
from gemma_jax.serving.metrics import Metrics
from gemma_jax.serving.static_page import PAGES

OPEN = ("/health", *PAGES)  # without a key: whether the process is alive, and the page
FREE = (*OPEN, "/ready", "/metrics")  # of the rate limit
GONE = 499  # in the log: nobody waited for the answer
LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """Middleware around all routes.

    A browser tells where a page comes from that sends a request (`Origin`): pages of other servers
    are refused, as somebody who has opened one did not mean to ask this server.

    Args:
      hosts: Names in `Host` that are answered; empty: all.
      log: Takes a line about each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        limits: Limits,
        rate: RateLimit,
        metrics: Metrics,
        hosts: frozenset[str] = frozenset(),
        log: Callable[[str], None] | None = None,
    ):
        self._app, self._keys, self._limits, self._rate = app, keys, limits, rate
        self._metrics, self._hosts, self._log = metrics, hosts, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note: dict = {"id": f"req-{secrets.token_hex(8)}", "route": "", "status": 0}
        scope.setdefault("state", {}).update(note=note, owner="")
        began, sent = time.monotonic(), _Sent(send, note)
        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            await self._app(scope, _Bounded(receive, headers, self._limits), sent)
        except ApiError as error:
            await sent.refuse(error, scope, receive)
        except ClientGoneError:
            note["status"] = note["status"] or GONE
        finally:
            self._tell(scope, note, time.monotonic() - began)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            raise ApiError(
                f"the host {host!r:.80} is not served here", status=421, code="wrong_host"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(
                "pages of other servers are not answered", status=403, code="wrong_origin"
            )
        if scope["path"] in OPEN:
            return
        owner = self._keys.owner(headers)
        client = scope.get("client")
        scope["state"]["owner"] = owner
        if scope["path"] not in FREE:
            self._rate.check(owner or (client[0] if client else ""))

    def _tell(self, scope: Scope, note: dict, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        note["route"] = route
        self._metrics.served(route, note["status"] or 500)
        if self._log is not None:
            line = {"time": round(time.time(), 3), **note, "owner": scope["state"]["owner"] or None}
            line["seconds"] = round(seconds, 4)
            kept = {name: value for name, value in line.items() if value is not None}
            self._log(json.dumps(kept))


class _Sent:
    """Sends what the app sends, and remembers its status."""

    def __init__(self, send: Send, note: dict):
        self._send, self._note = send, note

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._note["status"] = message["status"]
            headers = [(b"x-request-id", self._note["id"].encode())]
            headers.append((b"x-content-type-options", b"nosniff"))
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await self._send(message)

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if self._note["status"]:  # an answer has begun, and cannot become another one
            return
        self._note["error"] = error.code
        headers = {**error.headers, "Connection": "close"} if error.status == 413 else error.headers
        await JSON(error.body, error.status, headers)(scope, receive, self)


class _Bounded:
    """Receives a body that is neither too large nor too slow."""

    def __init__(self, receive: Receive, headers: Headers, limits: Limits):
        self._receive, self._limits, self._size = receive, limits, 0
        self._until, self._whole = time.monotonic() + limits.body_seconds, False
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limits.body_bytes:
            raise self._too_large()

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                f"the body did not arrive within {self._limits.body_seconds:g} s",
                status=408,
                code="request_timeout",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._size > self._limits.body_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body has more than {self._limits.body_bytes:,} bytes",
            status=413,
            code="request_too_large",
        )


def _name(host: str) -> str:
    """The host without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
