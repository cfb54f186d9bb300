"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gemma_jax.inference.requests import Request
from gemma_jax.serving.answered import answered
from gemma_jax.serving.events import DONE, event
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.generation import Generation
from gemma_jax.serving.log_probs import chat_content
from gemma_jax.serving.messages import Conversation, read_messages
from gemma_jax.serving.schema import Wanted, new_tokens, read_wanted
from gemma_jax.serving.state import State
from gemma_jax.serving.structured import Structure, constrained, read_structure
from gemma_jax.serving.text_track import Part, Token
from gemma_jax.text import chat_stop_ids


@dataclass(frozen=True)
class ChatCall:
    """Holds a request as it was read."""

    wanted: Wanted
    conversation: Conversation
    structure: Structure | None


def read_call(fields: Fields, state: State) -> ChatCall:
    """All fields of the body, each honoured or refused.

    Raises:
      ApiError: The first that is wrong.
    """
    limits = state.served.limits
    bound = new_tokens(fields, limits, "max_completion_tokens", "max_tokens")
    log_probs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", low=0, high=limits.log_probs)
    if top is not None and not log_probs:
        raise fields.error("needs logprobs: true", "top_logprobs")
    asked = (top or 0) if log_probs else None
    wanted = read_wanted(fields, state.served, new_tokens=bound, log_probs=asked)
    structure = read_structure(fields, limits)
    _refuse_others(fields)
    conversation = read_messages(fields, state.media())
    fields.close()
    return ChatCall(wanted, conversation, structure)


def _refuse_others(fields: Fields) -> None:
    fields.only("modalities", ["text"], because="the model writes text alone")
    fields.only("audio", because="the model writes text alone")
    fields.only("prediction", because="answers are written without one")
    fields.only("reasoning_effort", "none", because="the model does not reason apart")
    fields.only("verbosity", "medium", because="the model has no such setting")
    fields.only("web_search_options", because="nothing is searched for")
    fields.only("functions", because="give tools")
    fields.only("function_call", because="give tool_choice")
    fields.only("chat_template_kwargs", {}, because="the template is the checkpoint's")
    fields.only("tools", [], because="tools are not available on this server")
    fields.only("tool_choice", "none", "auto", because="tools are not available on this server")
    fields.only("parallel_tool_calls", True, False, because="expected true or false")


def make_requests(call: ChatCall, state: State, owner: str) -> list[Request]:
    """What to ask the engine."""
    served, conversation = state.served, call.conversation
    options = (
        {} if conversation.pan_and_scan is None else dict(pan_and_scan=conversation.pan_and_scan)
    )
    prompt = served.reader(**options).chat(conversation.messages)
    requests = call.wanted.requests(
        prompt,
        served,
        owner=owner,
        deadline=state.deadline(),
        model_stops=chat_stop_ids(served.tokenizer),
    )
    if call.structure is None:
        return requests
    return [constrained(r, call.structure, served) for r in requests]


async def chat_completions(http: HttpRequest) -> Response:
    """The route."""
    return await answered(http, read_call, make_requests, ChatAnswer)


@dataclass
class _Choice:
    """One answer so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class ChatAnswer:
    """Tells of the answers to one call, whole or in events."""

    def __init__(self, call: ChatCall, state: State, generation: Generation):
        self._call, self._state, self._generation = call, state, generation
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": call.wanted.model,
        }

    async def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        choices = [_Choice() for _ in range(self._call.wanted.choices)]
        async for part in self._generation.parts():
            choice = choices[part.index]
            choice.text += part.text
            choice.tokens += part.tokens
            choice.finish_reason = part.finish_reason
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": self._generation.finish().body,
        }

    def _choice(self, index: int, choice: _Choice) -> dict:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._log_probs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        for i in range(self._call.wanted.choices):
            yield self._event(i, {"role": "assistant", "content": "", "refusal": None})
        async for part in self._generation.parts():
            if part.text or (part.tokens and self._call.wanted.log_probs is not None):
                yield self._event(part.index, {"content": part.text}, part)
            if part.finish_reason is not None:
                yield self._event(part.index, {}, reason=part.finish_reason)
        if self._call.wanted.include_usage:
            yield self._chunk([], self._generation.finish().body)
        yield DONE

    def _event(
        self, index: int, delta: dict, part: Part | None = None, reason: str | None = None
    ) -> bytes:
        log_probs = None if part is None else self._log_probs(part.tokens)
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return self._chunk([choice], None)

    def _chunk(self, choices: list[dict], usage: dict | None) -> bytes:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._call.wanted.include_usage:
            chunk["usage"] = usage
        return event(chunk)

    def _log_probs(self, tokens: list[Token]) -> dict | None:
        top = self._call.wanted.log_probs
        if top is None:
            return None
        return {"content": chat_content(self._state.served.tokenizer, tokens, top), "refusal": None}
