"""POST /v1/responses, of which nothing is kept."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gemma_jax.serving.answered import answered
from gemma_jax.serving.chat import ChatCall, make_requests
from gemma_jax.serving.events import event
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.generation import Generation
from gemma_jax.serving.response_items import Output, read_input
from gemma_jax.serving.schema import ONLY_ALONE, new_tokens, read_wanted
from gemma_jax.serving.state import State
from gemma_jax.serving.structured import Structure, read_text_format
from gemma_jax.serving.text_track import Part
from gemma_jax.serving.tools import read_tools

INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}  # of both APIs


@dataclass(frozen=True)
class ResponseCall(ChatCall):
    """Holds a request as it was read, and what of it the answer repeats."""

    repeated: dict


def read_call(fields: Fields, state: State) -> ResponseCall:
    """All fields of the body, each honoured or refused.

    Raises:
      ApiError: The first that is wrong.
    """
    served, limits = state.served, state.served.limits
    fields.only("n", 1, because="there is one answer")
    bound = new_tokens(fields, limits, "max_output_tokens")
    wanted = read_wanted(fields, served, new_tokens=bound, log_probs=None)
    use = read_tools(fields, served.tokenizer, limits)
    structure = use.structure(_text_format(fields, state), served.structured is not None)
    _refuse_others(fields)
    conversation = read_input(fields, state.media())
    fields.close()
    text = fields.raw("text") or {}
    repeated = {
        "instructions": fields.raw("instructions"),
        "max_output_tokens": bound,
        "parallel_tool_calls": use.parallel,
        "temperature": wanted.sampling.temperature,
        "top_p": wanted.sampling.top_p,
        "tool_choice": use.choice,
        "tools": fields.raw("tools") or [],
        "text": {"format": text.get("format") or {"type": "text"}},
    }
    return ResponseCall(wanted, conversation, structure, use, repeated)


def _text_format(fields: Fields, state: State) -> Structure | None:
    text = fields.object("text")
    if text is None:
        return None
    text.only("verbosity", "medium", because="the model has no such setting")
    given = text.object("format")
    text.close()
    return None if given is None else read_text_format(given, state.served.limits)


def _refuse_others(fields: Fields) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.only(name, because=ONLY_ALONE)
    fields.only("background", False, because=ONLY_ALONE)
    fields.only("include", [], because="answers are told of in full")
    fields.only("truncation", "disabled", because="a prompt is read whole or not at all")
    fields.only("reasoning", {}, because="the model does not reason apart")
    fields.only("max_tool_calls", because="the server calls no tools itself")
    fields.only("top_logprobs", 0, because="log-probabilities are told of in chat/completions")


async def responses(http: HttpRequest) -> Response:
    """The route."""
    return await answered(http, read_call, make_requests, ResponseAnswer)


class ResponseAnswer:
    """Tells of the answer to one call, whole or in events."""

    def __init__(self, call: ResponseCall, state: State, generation: Generation):
        self._call, self._generation = call, generation
        self._written = call.use.written()
        self._output, self._count = Output(self._written), 0
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": call.wanted.model,
        }

    async def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        async for part in self._generation.parts():
            for _ in self._push(part):
                pass
        return self._body(self._status)

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream, each with its number."""
        for kind in ("created", "in_progress"):
            yield self._event(self._of_response(kind, "in_progress"))
        async for part in self._generation.parts():
            for told in self._push(part):
                yield self._event(told)
        yield self._event(self._of_response(self._status, self._status))

    def _push(self, part: Part) -> Iterator[dict]:
        deltas = self._written.push(part)
        if self._written.ended:
            self._generation.stop(0)
        yield from self._output.push(deltas)
        if self._written.finish_reason is not None:
            yield from self._output.close(self._status == "completed")

    @property
    def _status(self) -> str:
        return "incomplete" if self._written.finish_reason in INCOMPLETE else "completed"

    def _of_response(self, kind: str, status: str) -> dict:
        return {"type": f"response.{kind}", "response": self._body(status)}

    def _event(self, told: dict) -> bytes:
        self._count += 1
        return event({**told, "sequence_number": self._count - 1}, told["type"])

    def _body(self, status: str) -> dict:
        cut = INCOMPLETE[self._written.finish_reason] if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut and {"reason": cut},
            "output": self._output.items,
            **self._call.repeated,
            "metadata": {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict:
        usage = self._generation.finish()
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.new,
            "output_tokens_details": {"reasoning_tokens": 0},  # the model has none
            "total_tokens": usage.prompt + usage.new,
        }
