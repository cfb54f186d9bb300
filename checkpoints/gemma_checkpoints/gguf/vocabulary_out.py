"""The vocabulary of a checkpoint -> keys `tokenizer.*` of a GGUF header.

What a GGUF file says of it is copied, key by key; that of a Hugging Face folder is written as
llama.cpp's converter does it (`_create_vocab_sentencepiece`, `SpecialVocab`).
"""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.text import hf_json, sentencepiece_proto
from gemma_jax.text.gguf_config import STOP_PIECES
from gemma_jax.text.gguf_header import ARRAY, MAGIC, U32, Cursor
from gemma_jax.text.tokenizer_config import read_tokenizer_config
from gemma_jax.text.vocabulary import SPACE, Kind, Vocabulary

from ..errors import CheckpointError
from ..generation_config import GenerationDefaults
from .sampling import PREFIX as SAMPLING

PAD_SCORE, ADDED_SCORE = -10_000.0, -1_000.0
_RESERVED = re.compile(rb"<unused\d+>|<mask>|<2mass>|\[@BOS@\]|<pad>")  # `does_token_look_special`
_TYPES = {
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.int8): "INT8",
    np.dtype(np.uint16): "UINT16",
    np.dtype(np.int16): "INT16",
    np.dtype(np.uint32): "UINT32",
    np.dtype(np.int32): "INT32",
    np.dtype(np.uint64): "UINT64",
    np.dtype(np.int64): "INT64",
    np.dtype(np.float32): "FLOAT32",
    np.dtype(np.float64): "FLOAT64",
    np.dtype(bool): "BOOL",
}
EOS = "tokenizer.ggml.eos_token_id"
TOKENS, SCORES, TYPES = (f"tokenizer.ggml.{key}" for key in ("tokens", "scores", "token_type"))
# What describes the weights of the file that it is copied from, and not those of the new one.
NOT_COPIED = re.compile(
    r"general\.(architecture|type|alignment|file_type|quantization_version|size_label|name"
    r"|quantized_by)"
)


def add_vocabulary(writer: Any, path: Path, vocab_size: int, *, sampling: bool) -> None:
    """Puts a vocabulary into a `GGUFWriter`, with a piece for each row of the embedding.

    Args:
      path: A GGUF file, a `tokenizer.json` or a `tokenizer.model`; `find_tokenizer` finds it.
      sampling: Whether what a GGUF file says of sampling goes along.

    Raises:
      CheckpointError: It is broken.
    """
    try:
        if path.suffix in (".json", ".model"):
            _add_from_folder(writer, path, vocab_size)
        else:
            _add_from_gguf(writer, path, vocab_size, sampling)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from None


def add_generation(writer: Any, defaults: GenerationDefaults) -> None:
    """Puts what a folder says of texts into a `GGUFWriter` that has its vocabulary.

    All settings of sampling are written: llama.cpp has defaults of its own for those that a file
    does not say.

    Raises:
      ValueError: More ids end an answer than a file can say.
    """
    keys = writer.kv_data[0]
    pieces = keys[TOKENS].value
    known = {keys[EOS].value, *(pieces.index(p) for p in STOP_PIECES.intersection(pieces))}
    more = [i for i in defaults.stop_ids or () if i not in known]
    adders = [a for key, a in (("eot", writer.add_eot_token_id), ("eom", writer.add_eom_token_id))
              if f"tokenizer.ggml.{key}_token_id" not in keys]  # fmt: skip
    if len(more) > len(adders):
        raise ValueError(f"ids that end an answer ({more}) are more than a GGUF file can say")
    for add, i in zip(adders, more):
        add(i)
    if (sampling := defaults.sampling) is not None:
        writer.add_sampling_temp(float(sampling.temperature))
        writer.add_sampling_top_k(int(sampling.top_k))
        writer.add_sampling_top_p(float(sampling.top_p))
        writer.add_sampling_min_p(float(sampling.min_p))
        writer.add_sampling_penalty_repeat(float(sampling.repetition_penalty))


def name_in_header(path: Path) -> str | None:
    """`general.name` of a GGUF file."""
    entries = dict((key, value) for key, _, value in _typed_entries(path))
    name = entries.get("general.name")
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else None


def _add_from_gguf(writer: Any, path: Path, vocab_size: int, sampling: bool) -> None:
    from gguf import GGUFValueType

    for key, kind, value in _typed_entries(path):
        general = key.startswith("general.") and not NOT_COPIED.match(key)
        if not general and not key.startswith("tokenizer."):
            continue
        if key.startswith(SAMPLING) and not sampling:
            continue
        if kind == ARRAY:
            sub_type = GGUFValueType.STRING
            if isinstance(value, np.ndarray):
                sub_type = GGUFValueType[_TYPES[value.dtype]]
                value = value.tolist()
            value = _padded(key, value, vocab_size)
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=sub_type)
        else:
            writer.add_key_value(key, value, GGUFValueType(kind))


def _padded(key: str, values: list, count: int) -> list:
    """One entry for each row of the embedding, where there is one for each piece."""
    if key not in (TOKENS, SCORES, TYPES):
        return values
    filler = {
        TOKENS: lambda i: b"[PAD%d]" % i,
        SCORES: lambda i: PAD_SCORE,
        TYPES: lambda i: int(Kind.UNUSED),
    }[key]
    return [*values[:count], *(filler(i) for i in range(len(values), count))]


def _add_from_folder(writer: Any, path: Path, vocab_size: int) -> None:
    read = hf_json.read_tokenizer_json if path.suffix == ".json" else sentencepiece_proto.read_model
    config = read_tokenizer_config(path.parent)
    vocabulary = read(path.read_bytes()).with_added(config.added).with_specials(config.specials)
    pieces, scores, kinds = _spelled(vocabulary, config.added)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(_padded(TOKENS, pieces, vocab_size))
    writer.add_token_scores(_padded(SCORES, scores, vocab_size))
    writer.add_token_types(_padded(TYPES, kinds, vocab_size))
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    writer.add_bos_token_id(vocabulary.id_of(config.bos_token or "<bos>"))
    writer.add_eos_token_id(vocabulary.id_of(config.eos_token or "<eos>"))
    writer.add_unk_token_id(ids[b"<unk>"])
    writer.add_pad_token_id(ids[b"<pad>"])
    writer.add_add_bos_token(config.add_bos)
    writer.add_add_eos_token(False)
    if config.chat_template is not None:
        writer.add_chat_template(config.chat_template.text)
    writer.add_add_space_prefix(False)


def _spelled(vocabulary: Vocabulary, added) -> tuple[list[bytes], list[float], list[int]]:
    """Pieces, scores and types, as llama.cpp wants them: spaces in pieces that are found before any
    merge are spaces, and reserved pieces are control pieces."""
    pieces, kinds = list(vocabulary.pieces), list(vocabulary.kinds)
    scores = vocabulary.scores.tolist()
    for i, piece in enumerate(pieces):
        if not piece:
            pieces[i], scores[i], kinds[i] = b"[PAD%d]" % i, PAD_SCORE, int(Kind.UNUSED)
        elif kinds[i] in (Kind.USER_DEFINED, Kind.CONTROL):
            reserved = kinds[i] == Kind.USER_DEFINED and _RESERVED.fullmatch(piece)
            kinds[i] = int(Kind.CONTROL) if reserved else kinds[i]
            pieces[i] = piece.replace(SPACE, b" ") if kinds[i] == Kind.USER_DEFINED else piece
            scores[i] = ADDED_SCORE if i in added else scores[i]
    return pieces, scores, kinds


class _TypedCursor(Cursor):
    def value(self):
        (kind,) = U32.unpack_from(self.data, self.pos)
        return kind, super().value()


def _typed_entries(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Key, number of its type, and value; arrays as NumPy arrays or lists of bytes."""
    with open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            entries = _TypedCursor(data, len(MAGIC)).header()
    for key, (kind, value) in entries.items():  # pyright: ignore[reportGeneralTypeIssues]
        yield key, kind, value
