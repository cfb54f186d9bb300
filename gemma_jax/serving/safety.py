"""Prompts and answers that pass a check before anybody sees an answer.

An answer that is streamed is held back until it is whole and was checked: a text can turn bad with
its last word, and what was sent cannot be taken back.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from gemma_jax.serving.errors import ApiError, refused
from gemma_jax.serving.generation import Generation, Usage
from gemma_jax.serving.state import State
from gemma_jax.serving.text_track import Part

# From a question, an answer or `None`, and pictures, to the policy violated or `None`.
Check = Callable[[str, str | None, Sequence[object]], str | None]


def asked(call: Any) -> list[tuple[str, list[object]]]:
    """The texts and pictures of each prompt of a call.

    Raises:
      TypeError: A call whose prompts are nowhere to be found: better no answer than one unchecked.
    """
    if hasattr(call, "conversation"):
        return [_of_messages(call.conversation.messages)]
    if hasattr(call, "prompts"):
        return [(prompt, []) for prompt in call.prompts]
    raise TypeError(f"nothing is known of the prompts of a {type(call).__name__}")


def _of_messages(messages: Sequence[dict]) -> tuple[str, list[object]]:
    """All that is said in a conversation, whoever said it, as one text; and its pictures."""
    texts, pictures = [], []
    for message in messages:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
        texts += [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
        pictures += [part["image"] for part in parts if part["type"] == "image"]
    return "\n\n".join(text for text in texts if text), pictures


class Safety:
    """Asks checks on behalf of one call.

    Args:
      checks: Each sees every prompt and answer; the first violation counts.
    """

    def __init__(self, state: State, checks: Sequence[Check], call: Any):
        self._state, self._checks = state, checks
        decode = state.served.tokenizer.decode
        self._asked = [
            (text if isinstance(text, str) else decode(text), pictures)
            for text, pictures in asked(call)
        ]
        self._choices = call.wanted.choices

    async def check_prompts(self) -> None:
        """Raises `ApiError`, 400 with the code `content_filter`, for a prompt that violates one."""
        for text, pictures in self._asked:
            await self._check(text, None, pictures, "the prompt")

    async def answer_violates(self, index: int, text: str) -> bool:
        """Whether an answer must not be told."""
        question, _ = self._asked[index // self._choices]
        try:
            await self._check(question, text, (), "the answer")
        except ApiError as error:
            if error.code == "content_filter":
                return True
            raise
        return False

    async def _check(self, question, answer, pictures, what: str) -> None:
        for check in self._checks:
            policy = await self._state.read(check, question, answer, pictures)
            if policy is not None:
                raise refused(
                    f"{what} violates the policy {policy!r} of this server", code="content_filter"
                )


class Screened:
    """A generation whose answers are told of once they are whole and were checked."""

    def __init__(self, generation: Generation, safety: Safety):
        self._generation, self._safety = generation, safety

    @property
    def usage(self) -> Usage:
        return self._generation.usage

    def finish(self) -> Usage:
        return self._generation.finish()

    def stop(self, index: int) -> None:
        """Ends one answer."""
        self._generation.stop(index)

    async def parts(self) -> AsyncIterator[Part]:
        """One part for each answer; without text, `"content_filter"`, if it must not be told."""
        held: dict[int, Part] = {}
        async for part in self._generation.parts():
            had = held.get(part.index, Part(part.index))
            tokens, prompt = [*had.tokens, *part.tokens], [*had.prompt, *part.prompt]
            whole = Part(part.index, had.text + part.text, tokens, part.finish_reason, prompt)
            held[part.index] = whole
            if whole.finish_reason is None:
                continue
            if whole.text and await self._safety.answer_violates(whole.index, whole.text):
                whole = Part(whole.index, finish_reason="content_filter", prompt=prompt)
                self.usage.reasons[-1] = "content_filter"
            yield whole
