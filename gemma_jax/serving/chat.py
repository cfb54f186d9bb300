"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

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
from gemma_jax.serving.tools import Call, ToolUse, Written, chat_prompt, read_tools
from gemma_jax.text import chat_stop_ids
from gemma_jax.text.tool_calls import CallDelta, TextDelta


@dataclass(frozen=True)
class ChatCall:
    """Holds a conversation that is to go on, as it was read."""

    wanted: Wanted
    conversation: Conversation
    structure: Structure | None
    use: ToolUse

    @property
    def shown(self) -> Sequence[str]:
        return self.use.shown


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
    use = read_tools(fields, state.served.tokenizer, limits)
    structure = use.structure(read_structure(fields, limits), state.served.structured is not None)
    _refuse_others(fields)
    conversation = read_messages(fields, state.media())
    fields.close()
    return ChatCall(wanted, conversation, structure, use)


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


def make_requests(call: ChatCall, state: State, owner: str) -> list[Request]:
    """What to ask the engine."""
    served, conversation = state.served, call.conversation
    options = (
        {} if conversation.pan_and_scan is None else dict(pan_and_scan=conversation.pan_and_scan)
    )
    prompt = chat_prompt(served.reader(**options), conversation.messages, call.use)
    requests = call.wanted.requests(
        prompt,
        served,
        owner=owner,
        deadline=state.deadline(),
        model_stops=(*chat_stop_ids(served.tokenizer), *call.use.stop_ids(served.tokenizer)),
    )
    if call.structure is None:
        return requests
    return [constrained(r, call.structure, served) for r in requests]


async def chat_completions(http: HttpRequest) -> Response:
    """The route."""
    return await answered(http, read_call, make_requests, ChatAnswer)


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
        answers = self._answers()
        async for part in self._generation.parts():
            self._push(answers, part)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": self._generation.finish().body,
        }

    def _answers(self) -> list[Written]:
        return [self._call.use.written() for _ in range(self._call.wanted.choices)]

    def _push(self, answers: list[Written], part: Part) -> list[TextDelta | CallDelta]:
        deltas = answers[part.index].push(part)
        if answers[part.index].ended:
            self._generation.stop(part.index)
        return deltas

    def _choice(self, index: int, answer: Written) -> dict:
        content = None if answer.calls and not answer.text else answer.text
        message = {"role": "assistant", "content": content, "refusal": None}
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._log_probs(answer.tokens),
            "finish_reason": answer.finish_reason,
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        answers = self._answers()
        # Of an answer that may be calls alone nobody knows yet whether it has a text.
        first = None if self._call.use.declared else ""
        for i in range(len(answers)):
            yield self._event(i, {"role": "assistant", "content": first, "refusal": None})
        async for part in self._generation.parts():
            i, answer = part.index, answers[part.index]
            told = part.tokens if self._call.wanted.log_probs is not None else []
            for delta in self._push(answers, part):
                for each in _deltas(delta, answer):
                    yield self._event(i, each, told)
                    told = []
            if told:
                yield self._event(i, {"content": ""}, told)
            if answer.finish_reason is not None:
                yield self._event(i, {}, reason=answer.finish_reason)
        if self._call.wanted.include_usage:
            yield self._chunk([], self._generation.finish().body)
        yield DONE

    def _event(
        self, index: int, delta: dict, tokens: Sequence[Token] = (), reason: str | None = None
    ) -> bytes:
        log_probs = self._log_probs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        counted = self._call.wanted.continuous_usage
        return self._chunk([choice], self._generation.finish().body if counted else None)

    def _chunk(self, choices: list[dict], usage: dict | None) -> bytes:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._call.wanted.include_usage:
            chunk["usage"] = usage
        return event(chunk)

    def _log_probs(self, tokens: Sequence[Token]) -> dict | None:
        top = self._call.wanted.log_probs
        if top is None:
            return None
        return {"content": chat_content(self._state.served.tokenizer, tokens, top), "refusal": None}


def _call(call: Call) -> dict:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _deltas(delta: TextDelta | CallDelta, answer: Written) -> list[dict]:
    """As clients put them together: the name of a call first, then its arguments."""
    if isinstance(delta, TextDelta):
        return [{"content": delta.text}]
    call, deltas = answer.calls[delta.index], []
    if delta.name:
        begun = Call(delta.name, id=call.id)
        deltas.append({"tool_calls": [{"index": delta.index, **_call(begun)}]})
    if delta.arguments:
        more = {"index": delta.index, "function": {"arguments": delta.arguments}}
        deltas.append({"tool_calls": [more]})
    return deltas
