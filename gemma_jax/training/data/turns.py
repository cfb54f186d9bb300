"""Which characters of a conversation are the model's to say.

    <start_of_turn>model
    {answer}<end_of_turn>

Of these the opening is not: whoever asks the model writes it. The answer is, without the spaces
around it, and so are the end of the turn and the line break behind it: a model that is not trained
on its stop token does not stop.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.text import Tokenizer, in_gemma_format, render_chat, render_turn
from gemma_jax.text.chat import GENERATION_PROMPT

Span = tuple[int, int]
_ANSWERS = ("assistant", "model")


def render_with_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    media: Mapping[str, str],
) -> tuple[str, list[Span | None]]:
    """The text of a conversation, and where in it each message's answer lies, if it is one.

    Raises:
      ValueError: Messages that the template refuses, or a template that writes a conversation
        otherwise once it goes on.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=False, media=media)
    if in_gemma_format(tokenizer):
        return text, _gemma_spans(text, messages, media)
    spans: list[Span | None] = []
    for i, message in enumerate(messages):
        if message["role"] not in _ANSWERS:
            spans.append(None)
            continue
        before = render_chat(tokenizer, messages[:i], media=media)
        after = render_chat(tokenizer, messages[: i + 1], add_generation_prompt=False, media=media)
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                "the chat template does not write a conversation message by message, so what an "
                "answer is in it cannot be told"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _gemma_spans(text: str, messages, media) -> list[Span | None]:
    """Turn by turn, from the end: what is in front of the first turn is all before it."""
    spans: list[Span | None] = [None] * len(messages)
    end = len(text)
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] not in (*_ANSWERS, "user"):
            continue  # a system message is in the first turn
        turn = render_turn(messages[i], media=media)
        if messages[i]["role"] in _ANSWERS:
            spans[i] = (end - len(turn) + len(GENERATION_PROMPT), end)
        end -= len(turn)
    return spans
