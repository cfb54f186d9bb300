"""Reads the key-value header of a GGUF file, and the vocabulary in it.

The header holds everything but the weights. The `gguf` package reads it too, but makes NumPy
arrays of every string, which takes 20 s for Gemma's 262,144 pieces; this takes a tenth of one.
Format: `docs/gguf.md` of ggml-org/ggml. All numbers are little-endian.
"""

from __future__ import annotations

import mmap
import os
import re
import struct

import numpy as np

from .vocabulary import SPACE, Kind, Vocabulary, is_byte_piece

MAGIC = b"GGUF"
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_UNUSED_PIECE = re.compile(rb"<unused\d+>|<mask>")


def read_header(path: str | os.PathLike) -> dict[str, object]:
    """Every key of the header -> its value.

    Strings come as `bytes` (nothing promises that they are UTF-8), numbers as Python numbers, arrays
    as a NumPy array or a list of `bytes`. The weights are not touched: the file is mapped, not read.

    Raises:
      ValueError: not a GGUF file of version 2 or 3, or one that ends inside its header.
    """
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{os.fspath(path)}: expected a GGUF file, which begins with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(data, pos=4).header()
            except (ValueError, struct.error) as error:
                raise ValueError(f"{os.fspath(path)}: broken GGUF header: {error}") from None


def read_vocabulary(header: dict[str, object]) -> Vocabulary:
    """The vocabulary under `tokenizer.ggml.*`, as `read_header` returned it.

    Raises:
      ValueError: a key is missing, or the vocabulary splits text in another way than Gemma's.
    """
    model = _get(header, "tokenizer.ggml.model", bytes)
    if model != b"llama":
        raise ValueError(f"expected tokenizer.ggml.model 'llama' (SentencePiece BPE), got {model!r}")
    if header.get("tokenizer.ggml.add_space_prefix"):
        raise ValueError("expected tokenizer.ggml.add_space_prefix false: Gemma adds no space")
    pieces = list(_get(header, "tokenizer.ggml.tokens", list))
    scores = _get(header, "tokenizer.ggml.scores", np.ndarray).astype(np.float32)
    types = _get(header, "tokenizer.ggml.token_type", np.ndarray)
    if len(types) != len(pieces) or not np.isin(types, list(Kind)).all():
        raise ValueError(f"expected a token_type of 1..6 for each of {len(pieces)} tokens")
    kinds = bytearray(types.astype(np.uint8))
    for i in np.flatnonzero(types != Kind.NORMAL).tolist():
        # llama.cpp's converter writes runs of spaces as spaces, and calls every reserved piece a
        # control piece. tokenizer.model and tokenizer.json do neither.
        pieces[i] = pieces[i].replace(b" ", SPACE)
        if kinds[i] == Kind.CONTROL and _UNUSED_PIECE.fullmatch(pieces[i]):
            kinds[i] = Kind.USER_DEFINED
        if kinds[i] == Kind.BYTE and not is_byte_piece(pieces[i]):
            raise ValueError(f"byte token {i} must be spelled <0x00> ... <0xFF>, got {pieces[i]!r}")
    return Vocabulary.build(pieces, scores, kinds)


def _get(header: dict[str, object], key: str, kind: type):
    if not isinstance(header.get(key), kind):
        raise ValueError(f"expected {key} ({kind.__name__}), got {type(header.get(key)).__name__}")
    return header[key]


class _Cursor:
    """A position in the file; every method reads one thing and moves behind it."""

    def __init__(self, data: mmap.mmap, pos: int):
        self.data, self.pos, self.size = data, pos, len(data)

    def header(self) -> dict[str, object]:
        version = self.number(_U32)
        if version not in (2, 3):
            raise ValueError(f"expected version 2 or 3, little-endian, got {version}")
        self.number(_U64)  # how many tensors there are
        # A lying count cannot make this long: every round moves on, and the file ends somewhere.
        return {self.string().decode(): self.value() for _ in range(self.number(_U64))}

    def number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return value

    def string(self) -> bytes:
        length = self.number(_U64)
        self.need(length)
        self.pos += length
        return self.data[self.pos - length : self.pos]

    def value(self):
        kind = self.number(_U32)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.numbers(kind, 1)[0].item()

    def array(self):
        kind, count = self.number(_U32), self.number(_U64)
        if kind != _STRING:
            return self.numbers(kind, count)
        self.need(8 * count)  # before a list of `count` entries is begun
        return [self.string() for _ in range(count)]

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind} at byte {self.pos}")
        dtype = np.dtype(_SCALARS[kind])
        length = dtype.itemsize * count
        self.need(length)
        self.pos += length
        return np.frombuffer(self.data[self.pos - length : self.pos], dtype)

    def need(self, length: int) -> None:
        if length > self.size - self.pos:
            left = self.size - self.pos
            raise ValueError(f"{length} bytes expected at byte {self.pos}, the file has {left} more")
