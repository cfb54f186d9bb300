"""POST /v1/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gemma_jax.inference.requests import Request
from gemma_jax.multimodal.prompts import Prompt
from gemma_jax.serving.answered import answered
from gemma_jax.serving.events import DONE, event
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.generation import Generation
from gemma_jax.serving.log_probs import completion_lists
from gemma_jax.serving.schema import Wanted, new_tokens, read_wanted
from gemma_jax.serving.state import State
from gemma_jax.serving.structured import Structure, constrained, read_structure
from gemma_jax.serving.text_track import Part

NEW_TOKENS = 16  # where a request does not say, as the API has it


@dataclass(frozen=True)
class CompletionCall:
    """Holds a request as it was read; prompts are texts or token ids.

    Attributes:
      scored: Whether the log-probabilities of the prompts are told, or nothing is to be written.
    """

    wanted: Wanted
    prompts: list[str | list[int]]
    echo: bool
    scored: bool
    structure: Structure | None
    shown: tuple[str, ...] = ()  # special tokens are no text here


def read_call(fields: Fields, state: State) -> CompletionCall:
    """All fields of the body, each honoured or refused.

    Raises:
      ApiError: The first that is wrong.
    """
    served, limits = state.served, state.served.limits
    echo = fields.boolean("echo")
    least = 0 if echo else 1
    bound = new_tokens(fields, limits, "max_tokens", default=NEW_TOKENS, least=least)
    log_probs = fields.integer("logprobs", low=0, high=limits.log_probs)
    wanted = read_wanted(fields, served, new_tokens=bound, log_probs=log_probs)
    prompts = fields.texts_or_ids("prompt", vocab_size=served.cfg.vocab_size)
    if len(prompts) * wanted.choices > limits.choices:
        raise fields.error(f"more than {limits.choices} answers to one request", "prompt")
    fields.only("suffix", because="the model writes at the end alone")
    fields.only("best_of", wanted.choices, because="all answers are returned; give n")
    structure = read_structure(fields, limits)
    fields.close()
    scored = echo and (log_probs is not None or bound == 0)
    return CompletionCall(wanted, prompts, echo, scored, structure)


def make_requests(call: CompletionCall, state: State, owner: str) -> list[Request]:
    """What to ask the engine: all answers to the first prompt, then those to the second."""
    served, requests = state.served, []
    reader, deadline = served.reader(), state.deadline()
    for text in call.prompts:
        prompt = reader.text(text) if isinstance(text, str) else Prompt(text)
        requests += call.wanted.requests(
            prompt,
            served,
            owner=owner,
            deadline=deadline,
            model_stops=tuple(served.tokenizer.stop_ids),
        )
    requests = [replace(one, prompt_log_probs=call.scored) for one in requests]
    if call.structure is None:
        return requests
    return [constrained(r, call.structure, served) for r in requests]


async def completions(http: HttpRequest) -> Response:
    """The route."""
    return await answered(http, read_call, make_requests, CompletionAnswer)


class CompletionAnswer:
    """Tells of the answers to one call, whole or in events."""

    def __init__(self, call: CompletionCall, state: State, generation: Generation):
        self._call, self._served, self._generation = call, state.served, generation
        self._count = len(call.prompts) * call.wanted.choices
        self._echoes = [self._echo(i) for i in range(self._count)]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": call.wanted.model,
        }

    async def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        texts, tokens = list(self._echoes), [[] for _ in self._echoes]
        reasons: list[str | None] = [None] * self._count
        async for part in self._generation.parts():
            texts[part.index] += part.text
            tokens[part.index] += [*part.prompt, *part.tokens]  # all of the prompt come first
            reasons[part.index] = part.finish_reason
        choices = [
            {
                "index": i,
                "text": texts[i],
                "logprobs": self._log_probs(Part(i, tokens=tokens[i])),
                "finish_reason": reasons[i],
            }
            for i in range(self._count)
        ]
        return {**self._head, "choices": choices, "usage": self._generation.finish().body}

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        for i, text in enumerate(self._echoes):
            if text:
                yield self._chunk(Part(i, text))
        async for part in self._generation.parts():
            yield self._chunk(part)
        if self._call.wanted.include_usage:
            usage = self._generation.finish().body
            yield event({**self._head, "choices": [], "usage": usage})
        yield DONE

    def _echo(self, index: int) -> str:
        if not self._call.echo:
            return ""
        prompt = self._call.prompts[index // self._call.wanted.choices]
        return prompt if isinstance(prompt, str) else self._served.tokenizer.decode(prompt)

    def _chunk(self, part: Part) -> bytes:
        choice = {
            "index": part.index,
            "text": part.text,
            "logprobs": self._log_probs(part),
            "finish_reason": part.finish_reason,
        }
        chunk = {**self._head, "choices": [choice]}
        if self._call.wanted.include_usage:
            counted = self._call.wanted.continuous_usage
            chunk["usage"] = self._generation.finish().body if counted else None
        return event(chunk)

    def _log_probs(self, part: Part) -> dict | None:
        top = self._call.wanted.log_probs
        if top is None:
            return None
        tokens, offset = [*part.prompt, *part.tokens], len(self._echoes[part.index])
        return completion_lists(self._served.tokenizer, tokens, top, offset)
