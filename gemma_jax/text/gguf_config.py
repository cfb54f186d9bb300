"""What the header of a GGUF file says of its vocabulary, as llama.cpp understands it.

Source: `src/llama-vocab.cpp` of llama.cpp, `llama_vocab::impl::load`.
"""

from __future__ import annotations

from .chat_template import ChatTemplate
from .tokenizer_config import TokenizerConfig
from .vocabulary import Vocabulary

_PREFIX = "tokenizer.ggml."
BOS, STOPS = "bos_token_id", ("eos_token_id", "eot_token_id", "eom_token_id")
# Pieces that end an answer in every file that has them, whatever its keys say.
STOP_PIECES = frozenset(
    b"<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    b"<|endoftext|> <|eom_id|> <EOT> _<EOT> <|end_of_text|> <end_of_utterance>".split()
)


def read_gguf_config(
    header: dict[str, object], vocabulary: Vocabulary
) -> tuple[TokenizerConfig, set[int]]:
    """What the keys beside the vocabulary say, and the ids that end an answer.

    Raises:
      ValueError: A key of another type, an id without a piece, or a wish that is not granted here.
    """
    if _flag(header, "add_eos_token", False):
        raise ValueError(f"{_PREFIX}add_eos_token is set; expected a file without it")
    specials, pieces = vocabulary.specials(), vocabulary.pieces
    given = {key: _id(header, key, pieces) for key in (*STOPS, BOS) if _PREFIX + key in header}
    stops = {given[key] for key in STOPS if key in given}
    if STOPS[0] not in given and "<eos>" in specials:
        stops.add(specials["<eos>"])
    stops |= {pieces.index(piece) for piece in STOP_PIECES.intersection(pieces)}
    bos, eos = (pieces[given[key]].decode() if key in given else None for key in (BOS, STOPS[0]))
    text = header.get("tokenizer.chat_template")
    if text is not None and not isinstance(text, bytes):
        raise ValueError("tokenizer.chat_template must be a text")
    return (
        TokenizerConfig(
            bos_token=bos,
            eos_token=eos,
            specials=tuple(name for name in (bos, eos) if name is not None),
            add_bos=_flag(header, "add_bos_token", True),
            chat_template=text
            and ChatTemplate(
                text.decode("utf-8", "replace"),
                "tokenizer.chat_template",
                {"bos_token": bos or "<bos>", "eos_token": eos or "<eos>"},
                # llama.cpp tokenizes what a template makes like any other prompt.
                add_bos=_flag(header, "add_bos_token", True),
            ),
        ),
        stops,
    )


def _flag(header: dict[str, object], key: str, default: bool) -> bool:
    value = header.get(_PREFIX + key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{_PREFIX}{key} must be true or false, got {value!r:.80}")
    return value


def _id(header: dict[str, object], key: str, pieces: list[bytes]) -> int:
    value = header[_PREFIX + key]
    known = isinstance(value, int) and 0 <= value < len(pieces)
    if isinstance(value, bool) or not known or not pieces[value]:
        raise ValueError(f"{_PREFIX}{key} must be the id of a piece, got {value!r:.80}")
    return value
