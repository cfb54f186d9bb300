"""The routes of a server, put together, and its end."""

import asyncio
import time
from collections.abc import Callable, Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gemma_jax.serving import routes
from gemma_jax.serving.auth import Keys
from gemma_jax.serving.chat import chat_completions
from gemma_jax.serving.completions import completions
from gemma_jax.serving.embeddings import embeddings
from gemma_jax.serving.errors import ApiError, failed
from gemma_jax.serving.events import JSON
from gemma_jax.serving.gate import Gate
from gemma_jax.serving.limits import RateLimit
from gemma_jax.serving.metrics import OURS, Metrics
from gemma_jax.serving.responses import responses
from gemma_jax.serving.served import Served
from gemma_jax.serving.state import State
from gemma_jax.serving.static_page import PAGES, page
from gemma_jax.serving.transcriptions import transcriptions

ROUTES = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/responses", responses),
    ("POST", "/v1/embeddings", embeddings),
    ("POST", "/v1/audio/transcriptions", transcriptions),
    ("GET", "/v1/models", routes.models),
    ("GET", "/v1/models/{id:path}", routes.model),
    ("POST", "/tokenize", routes.tokenize),
    ("POST", "/detokenize", routes.detokenize),
    ("GET", "/health", routes.health),
    ("GET", "/ready", routes.ready),
    ("GET", "/metrics", routes.metrics),
    *(("GET", path, page) for path in PAGES),
)


def make_app(
    served: Served,
    *,
    keys: Keys = Keys({}),
    requests_per_minute: float = 0,
    metrics_prefix: str = OURS,
    media_domains: Collection[str] = (),
    hosts: Collection[str] = (),
    log: Callable[[str], None] | None = None,
) -> Starlette:
    """An ASGI application.

    Args:
      keys: Whoever has one may ask; without any, everybody.
      requests_per_minute: Of one key, or of one address where there are no keys; 0: no bound.
      media_domains: Hosts that pictures may be fetched from.
      hosts: Names that the server is asked under; empty: any.
      log: Takes a line of JSON about each request; no prompts.
    """
    metrics = Metrics(served.name, metrics_prefix, served.engine.stats)
    gate = Middleware(
        Gate,
        keys=keys,
        limits=served.limits,
        rate=RateLimit(requests_per_minute),
        metrics=metrics,
        hosts=frozenset(hosts),
        log=log,
    )
    app = Starlette(
        routes=[Route(path, function, methods=[verb]) for verb, path, function in ROUTES],
        middleware=[gate],
        exception_handlers={ApiError: _refuse, HTTPException: _http_error, Exception: _fail},
    )
    app.router.redirect_slashes = False
    app.state.server = State(served, metrics, frozenset(media_domains))
    return app


async def drain(app: Starlette, grace: float) -> None:
    """Takes no new work, lets what runs finish for so many seconds, then ends it."""
    state: State = app.state.server
    state.draining, until = True, time.monotonic() + grace
    while state.running and time.monotonic() < until:
        await asyncio.sleep(0.05)
    for work in tuple(state.running):
        work.cancel()


async def _refuse(http: HttpRequest, error: ApiError) -> Response:
    http.state.note["error"] = error.code
    return JSON(error.body, error.status, error.headers)


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    words = {404: f"there is no {http.url.path:.120}", 405: f"{http.method} is not for this route"}
    wrong = ApiError(words.get(error.status_code, error.detail), status=error.status_code)
    return JSON(wrong.body, wrong.status, error.headers)


async def _fail(http: HttpRequest, error: Exception) -> Response:
    """What nobody has foreseen; the traceback goes to stderr, and not to the client."""
    return JSON(failed("the server failed; its log says why").body, 500)
