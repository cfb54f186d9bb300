"""What routes that generate have in common: a call is read, asked of the engine, and told of."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gemma_jax.inference.requests import Request
from gemma_jax.serving.events import JSON, EventStream, unless_gone
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.generation import Generation
from gemma_jax.serving.safety import Safety, Screened
from gemma_jax.serving.schema import Wanted
from gemma_jax.serving.state import State


class Call(Protocol):
    """A request as it was read."""

    @property
    def wanted(self) -> Wanted: ...

    @property
    def shown(self) -> Sequence[str]:
        """Special tokens that are part of the answers' texts."""
        ...


class Answer(Protocol):
    """Tells of the answers to one call."""

    async def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        ...

    def events(self) -> AsyncIterator[bytes]:
        """The same as it comes."""
        ...


async def answered(
    http: HttpRequest,
    read_call: Callable[[Fields, State], Call],
    make_requests: Callable[[Call, State, str], list[Request]],
    make_answer: Callable[[Call, State, Generation | Screened], Answer],
) -> Response:
    """Reads a call, asks the engine, and answers: whole, or in events."""
    state: State = http.app.state.server
    fields = await state.fields(http)
    state.served.require_writer()
    call = await state.read(read_call, fields, state)
    http.state.note.update(model=call.wanted.model, user=call.wanted.user or None)
    requests = await state.read(make_requests, call, state, http.state.owner)
    safety = Safety(state, state.served.checks, call) if state.served.checks else None
    if safety is not None:
        await safety.check_prompts()
    generation = await state.generation(http, requests, call.wanted.stops, call.shown)
    told = generation if safety is None else Screened(generation, safety)
    answer = make_answer(call, state, told)
    if call.wanted.stream:
        return EventStream(
            answer.events(),
            state.served.limits.write_seconds,
            lambda outcome: state.ended(http, generation),
        )
    try:
        return JSON(await unless_gone(http, answer.whole()))
    finally:
        state.ended(http, generation)
