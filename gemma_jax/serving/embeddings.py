"""POST /v1/embeddings: vectors of texts, by a model that has a head for them."""

import asyncio
import base64
import time
from dataclasses import dataclass

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gemma_jax.serving.errors import ApiError, too_many, unavailable
from gemma_jax.serving.events import JSON, unless_gone
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.generation import Usage
from gemma_jax.serving.state import State
from gemma_jax.text_embedding.embed import embedding_width, max_tokens, text_ids
from gemma_jax.text_embedding.embedder import Embedder, TooManyError

INPUTS, TOKENS = 2048, 300_000  # of one request, as in the API


@dataclass(frozen=True)
class EmbeddingCall:
    """Holds a request as it was read.

    Attributes:
      rows: Token ids of each text.
      dimensions: Numbers of each vector; `None`: all.
      packed: Whether vectors are sent as the bytes of float32 numbers in base 64.
    """

    model: str
    rows: list[list[int]]
    dimensions: int | None
    packed: bool
    user: str


async def embeddings(http: HttpRequest) -> Response:
    """The route."""
    state: State = http.app.state.server
    call = await state.read(_read_call, await state.fields(http), state)
    http.state.note.update(model=call.model, user=call.user or None)
    state.require_open()
    usage = Usage(prompt=sum(map(len, call.rows)), begun=time.monotonic(), reasons=["stop"])
    try:
        vectors = state.served.embedder.submit(call.rows, call.dimensions)
    except TooManyError as error:
        raise too_many(str(error), 1.0, "queue_full") from None
    made = await unless_gone(http, _wait(state, vectors))
    state.metrics.answered(usage, http.state.owner)
    http.state.note.update(prompt_tokens=usage.prompt)
    data = [
        {"object": "embedding", "index": i, "embedding": _told(vector, call.packed)}
        for i, vector in enumerate(made)
    ]
    tokens = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}
    return JSON({"object": "list", "data": data, "model": call.model, "usage": tokens})


async def _wait(state: State, vectors) -> np.ndarray:
    state.running.add(vectors)  # for who ends the server: it waits for these, or cancels them
    try:
        seconds = state.served.limits.seconds
        return await asyncio.wait_for(asyncio.wrap_future(vectors), seconds)
    except TimeoutError:
        raise unavailable(f"no vectors within {seconds:g} s") from None
    except asyncio.CancelledError:
        if not vectors.cancelled():
            raise
        raise unavailable("the server is shutting down") from None
    finally:
        state.running.discard(vectors)


def _told(vector: np.ndarray, packed: bool) -> str | list[float]:
    if packed:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def _read_call(fields: Fields, state: State) -> EmbeddingCall:
    """All fields of the body, each honoured or refused."""
    served = state.served
    name = fields.text("model")
    served.find(name)
    embedder = served.embedder
    if embedder is None:
        raise ApiError(
            f"{served.name} writes text, and has no head for embeddings",
            param="model",
            code="unsupported_model",
        )
    width = embedding_width(embedder.model)
    dimensions = fields.integer("dimensions", low=1, high=width)
    form = fields.text("encoding_format", "float", choices=("float", "base64"))
    user = fields.text("user", "", most=256) or ""
    task, truncate = fields.text("task"), fields.boolean("truncate")
    rows = _rows(fields, embedder, served.tokenizer, task, truncate)
    fields.close()
    return EmbeddingCall(name or served.name, rows, dimensions, form == "base64", user)


def _rows(
    fields: Fields, embedder: Embedder, tokenizer, task: str | None, truncate: bool
) -> list[list[int]]:
    cfg = embedder.model.cfg
    inputs = fields.texts_or_ids("input", vocab_size=cfg.vocab_size, most=INPUTS)
    if task is not None and not all(isinstance(one, str) for one in inputs):
        raise fields.error("token ids have their prompt already", "task")
    try:
        prompt = cfg.text_embedding.prompt(task)
    except ValueError as error:
        raise fields.error(str(error), "task") from None
    try:
        rows = [
            text_ids(embedder.model, tokenizer, one, prompt, truncate)
            if isinstance(one, str)
            else _fitting(one, max_tokens(embedder.model), truncate)
            for one in inputs
        ]
    except ValueError as error:
        raise fields.error(str(error), "input", "context_length_exceeded") from None
    if (total := sum(map(len, rows))) > TOKENS:
        raise fields.error(f"{total} tokens are more than {TOKENS}", "input")
    return rows


def _fitting(ids: list[int], longest: int, truncate: bool) -> list[int]:
    if len(ids) > longest and not truncate:
        raise ValueError(f"{len(ids)} tokens are more than {longest}; truncate cuts them off")
    return ids[:longest]
