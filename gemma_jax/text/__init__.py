"""Text in and out: tokenizer, streaming, chat format. Needs no JAX."""

from .chat import (
    GEMMA3_MEDIA,
    GEMMA3N_MEDIA,
    encode_chat,
    images_of,
    items_of,
    render,
    render_next,
    render_turn,
)
from .stream import StopText, StreamDecoder
from .tokenizer import Tokenizer

__all__ = [
    "GEMMA3N_MEDIA",
    "GEMMA3_MEDIA",
    "StopText",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "images_of",
    "items_of",
    "render",
    "render_next",
    "render_turn",
]
