"""Chat messages to a prompt, in the format of the model that they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import chat
from .chat import GEMMA3_MEDIA, Message
from .tokenizer import Tokenizer

OTHER_TURN = "<|turn>"  # of Gemma 4, whose format is not that of `chat.py`


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    media: Mapping[str, str] = GEMMA3_MEDIA,
) -> str:
    """The prompt of a conversation, by the checkpoint's template, or in Gemma 3's format.

    Raises:
      ValueError: There is no template, and the tokenizer is of models with another format.
    """
    template = tokenizer.chat_template
    if template is None and _marks_other_turns(tokenizer):
        raise ValueError(
            f"this tokenizer marks turns by {OTHER_TURN}, as Gemma 4 does, and has no chat "
            "template: put the model's chat_template.jinja beside it"
        )
    render = chat.render if template is None else template.render
    return render(messages, add_generation_prompt=add_generation_prompt, media=media)


def _marks_other_turns(tokenizer: Tokenizer) -> bool:
    known = tokenizer.special_ids
    return OTHER_TURN in known and "<start_of_turn>" not in known


def chat_bos(tokenizer: Tokenizer) -> bool:
    """Whether <bos> is put in front of a rendered conversation that has none."""
    return tokenizer.chat_template is None or tokenizer.chat_template.add_bos


def in_gemma_format(tokenizer: Tokenizer) -> bool:
    """Whether conversations are in the format of `chat.py`, which can be written turn by turn."""
    if (template := tokenizer.chat_template) is None:
        return not _marks_other_turns(tokenizer)
    return template.gemma is not None


def chat_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer in a conversation: in Gemma's format the end of a turn is one, also
    where the checkpoint names <eos> alone, as that of the first Gemma does."""
    if in_gemma_format(tokenizer) and "<end_of_turn>" in tokenizer.special_ids:
        return (*tokenizer.stop_ids, tokenizer.special_ids["<end_of_turn>"])
    return tuple(tokenizer.stop_ids)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    media: Mapping[str, str] = GEMMA3_MEDIA,
) -> list[int]:
    """Encodes chat messages in the model's format, by default Gemma 3's, with <bos> at most once.

    The ids are those of Hugging Face's `apply_chat_template`. Markers inside the messages count as
    markers there, and here: take "<start_of_turn>" and its like out of a text that is not to be
    trusted.

    Examples:
      >>> import gemma_jax as gj
      >>> tok = gj.load_tokenizer("checkpoints/elastic")
      >>> tok.decode(gj.encode_chat(tok, [{"role": "user", "content": "Hi"}]))
      '<bos><start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\n'
    """
    text = render_chat(
        tokenizer, messages, add_generation_prompt=add_generation_prompt, media=media
    )
    return tokenizer.encode(text, bos=chat_bos(tokenizer))
