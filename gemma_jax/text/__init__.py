"""Text in and out: tokenizer, streaming, chat format. Needs no JAX."""

from .chat import (
    GEMMA3_MEDIA,
    GEMMA3N_MEDIA,
    images_of,
    items_of,
    medium_of,
    render,
    render_next,
    render_turn,
)
from .chat_template import ChatTemplate
from .encode_chat import chat_bos, chat_stop_ids, encode_chat, in_gemma_format, render_chat
from .stream import StopText, StreamDecoder
from .tokenizer import Tokenizer

__all__ = [
    "GEMMA3N_MEDIA",
    "GEMMA3_MEDIA",
    "ChatTemplate",
    "StopText",
    "StreamDecoder",
    "Tokenizer",
    "chat_bos",
    "chat_stop_ids",
    "encode_chat",
    "images_of",
    "in_gemma_format",
    "items_of",
    "medium_of",
    "render",
    "render_chat",
    "render_next",
    "render_turn",
]
