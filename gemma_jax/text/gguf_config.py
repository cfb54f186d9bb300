"""What the header of a GGUF file says of its vocabulary, as llama.cpp understands it.

Source: `src/llama-vocab.cpp` of llama.cpp, `llama_vocab::impl::load`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .chat_template import ChatTemplate
from .tokenizer_config import TokenizerConfig
from .vocabulary import Vocabulary

_PREFIX = "tokenizer.ggml."
BOS, STOPS = "bos_token_id", ("eos_token_id", "eot_token_id", "eom_token_id")
# Tokens between files and their parts, which llama.cpp takes for ends as well.
CODE_STOPS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
# Pieces that end an answer in every file that has them, whatever its keys say.
STOP_PIECES = frozenset(
    b"<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    b"<|endoftext|> <|eom_id|> <EOT> _<EOT> <|end_of_text|> <end_of_utterance>".split()
)

# What is read here and in `gguf_header.py`.
USED = frozenset(
    "model tokens scores token_type add_space_prefix add_bos_token add_eos_token".split()
).union(STOPS, CODE_STOPS, [BOS])
# Key -> why it changes no ids and no text here.
IRRELEVANT: Mapping[str, str] = {
    **dict.fromkeys(
        ("merges", "pre", "token_type_count"),
        "of vocabularies of another kind than 'llama', which llama.cpp reads without it",
    ),
    **dict.fromkeys(
        ("unknown_token_id", "seperator_token_id", "padding_token_id", "cls_token_id",
         "mask_token_id"),
        "names a piece that the vocabulary marks itself, or that no decoder asks for",
    ),
    **dict.fromkeys(
        ("prefix_token_id", "suffix_token_id", "middle_token_id", "fim_pre_token_id",
         "fim_suf_token_id", "fim_mid_token_id"),
        "for filling in code; a prompt names the pieces that it wants",
    ),
    **dict.fromkeys(
        ("remove_extra_whitespaces", "precompiled_charsmap"),
        "llama.cpp reads it for vocabularies of the kind 't5' alone",
    ),
    **dict.fromkeys(
        ("add_padding_token", "add_unknown_token", "add_mask_token"),
        "Ollama's, which reads none of them",
    ),
}  # fmt: skip
# Key -> the value that changes nothing; any other is refused.
NEUTRAL: Mapping[str, object] = {
    "add_sep_token": False,
    "suppress_tokens": [],
    "normalizer.lowercase": False,
}
# Outside of `tokenizer.ggml.`.
TEMPLATE, NAMED_TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
OTHERS: Mapping[str, str] = {
    TEMPLATE: "used",
    NAMED_TEMPLATES: "names templates for tools and the like; the one without a name counts",
    "tokenizer.huggingface.json": "the vocabulary once more, which llama.cpp does not read",
}


def refuse_unknown_keys(header: Mapping[str, object]) -> None:
    """Raises `ValueError` for the first key `tokenizer.*` that has no fate here."""
    for key, value in header.items():
        if not key.startswith("tokenizer.") or key in OTHERS or key.startswith(TEMPLATE + "."):
            continue
        name = key.removeprefix(_PREFIX)
        if name in NEUTRAL:
            found = value.tolist() if hasattr(value, "tolist") else value
            if found != NEUTRAL[name]:
                raise ValueError(f"{key} is {found!r:.80}; only {NEUTRAL[name]!r} is supported")
        elif name == key or (name not in USED and name not in IRRELEVANT):
            raise ValueError(f"{key} is not known here: it may change how texts are read")


def read_gguf_config(
    header: dict[str, object], vocabulary: Vocabulary
) -> tuple[TokenizerConfig, set[int]]:
    """What the keys beside the vocabulary say, and the ids that end an answer.

    Raises:
      ValueError: A key of another type, an id without a piece, or a wish that is not granted here.
    """
    refuse_unknown_keys(header)
    if _flag(header, "add_eos_token", False):
        raise ValueError(f"{_PREFIX}add_eos_token is set; expected a file without it")
    specials, pieces = vocabulary.specials(), vocabulary.pieces
    keys = (*STOPS, *CODE_STOPS, BOS)
    given = {key: _id(header, key, pieces) for key in keys if _PREFIX + key in header}
    stops = {given[key] for key in (*STOPS, *CODE_STOPS) if key in given}
    if STOPS[0] not in given and "<eos>" in specials:
        stops.add(specials["<eos>"])
    stops |= {pieces.index(piece) for piece in STOP_PIECES.intersection(pieces)}
    bos, eos = (pieces[given[key]].decode() if key in given else None for key in (BOS, STOPS[0]))
    text = header.get(TEMPLATE)
    if text is not None and not isinstance(text, bytes):
        raise ValueError(f"{TEMPLATE} must be a text")
    return (
        TokenizerConfig(
            bos_token=bos,
            eos_token=eos,
            specials=tuple(name for name in (bos, eos) if name is not None),
            add_bos=_flag(header, "add_bos_token", True),
            chat_template=text
            and ChatTemplate(
                text.decode("utf-8", "replace"),
                TEMPLATE,
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
