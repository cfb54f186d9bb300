"""Reads the key-value header of a GGUF file, and the vocabulary in it.

The header holds everything but the weights. The `gguf` package reads it too, but makes NumPy
arrays of every string: many seconds for Gemma's 262,144 pieces, against a tenth of one here.
Format: `docs/gguf.md` of ggml-org/ggml. All numbers are little-endian.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from .vocabulary import SPACE, Kind, Vocabulary

Entry = TypeVar("Entry")

MAGIC = b"GGUF"
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
STRING, ARRAY = 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_MAX_BYTES = 1 << 28  # of one value; a broken length must not make copies of a file of 50 GB
_UNUSED_PIECE = re.compile(rb"<unused\d+>|<mask>")


def read_header(path: str | os.PathLike) -> dict[str, object]:
    """Every key of the header -> its value.

    Strings come as `bytes` (nothing promises that they are UTF-8), numbers as Python numbers,
    arrays as a NumPy array or a list of `bytes`. The file is mapped, so the weights are not read.

    Raises:
      ValueError: not a GGUF file of version 2 or 3, or one that ends inside its header.
    """
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{os.fspath(path)}: expected a GGUF file, which begins with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return Cursor(data, pos=4).header()
            except (ValueError, struct.error) as error:
                reason = "the file ends in it" if isinstance(error, struct.error) else error
                raise ValueError(f"{os.fspath(path)}: broken GGUF header: {reason}") from None


def read_vocabulary(header: dict[str, object]) -> Vocabulary:
    """The vocabulary under `tokenizer.ggml.*`, as `read_header` returned it.

    Raises:
      ValueError: a key is missing, or the vocabulary splits text in another way than Gemma's.
    """
    model = _get(header, "tokenizer.ggml.model", bytes)
    if model != b"llama":
        raise ValueError(
            f"expected tokenizer.ggml.model 'llama' (SentencePiece BPE), got {model!r}"
        )
    if header.get("tokenizer.ggml.add_space_prefix"):
        raise ValueError("expected tokenizer.ggml.add_space_prefix false: Gemma adds no space")
    pieces = list(_get(header, "tokenizer.ggml.tokens", list))
    scores = _get(header, "tokenizer.ggml.scores", np.ndarray).astype(np.float32)
    types = _get(header, "tokenizer.ggml.token_type", np.ndarray)
    if not len(pieces) == len(scores) == len(types):
        raise ValueError(
            f"expected as many scores and types as tokens, got {len(pieces)} tokens, "
            f"{len(scores)} scores, {len(types)} types"
        )
    kinds = types.tolist()
    for i in np.flatnonzero(types != Kind.NORMAL).tolist():
        # llama.cpp's converter writes runs of spaces as spaces, and calls every reserved piece a
        # control piece. tokenizer.model and tokenizer.json do neither.
        pieces[i] = pieces[i].replace(b" ", SPACE)
        if kinds[i] == Kind.CONTROL and _UNUSED_PIECE.fullmatch(pieces[i]):
            kinds[i] = Kind.USER_DEFINED
    return Vocabulary.build(pieces, scores, kinds)


def _get(header: dict[str, object], key: str, kind: type):
    if not isinstance(header.get(key), kind):
        raise ValueError(f"expected {key} ({kind.__name__}), got {type(header.get(key)).__name__}")
    return header[key]


class Cursor:
    """A position in the file; every method reads one thing and moves behind it."""

    def __init__(self, data: mmap.mmap, pos: int):
        self.data, self.pos, self.size = data, pos, len(data)

    def header(self) -> dict[str, object]:
        return self.metadata(self.counts()[1])

    def counts(self) -> tuple[int, int]:
        """The number of tensors and of metadata entries, after the version."""
        version = self.number(U32)
        if version not in (2, 3):
            raise ValueError(f"expected version 2 or 3, little-endian, got {version}")
        return self.number(U64), self.number(U64)

    def metadata(self, count: int) -> dict[str, object]:
        return self.entries(count, self.value)

    def entries(self, count: int, read: Callable[[], Entry]) -> dict[str, Entry]:
        """Names, each followed by what `read` reads; no name may occur twice."""
        found: dict[str, Entry] = {}
        # A lying count cannot make this long: every round moves on, and the file ends somewhere.
        for _ in range(count):
            name = self.string().decode()
            if name in found:
                raise ValueError(f"{name!r} occurs twice")
            found[name] = read()
        return found

    def number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return value

    def string(self) -> bytes:
        length = self.number(U64)
        self.need(length)
        self.pos += length
        return self.data[self.pos - length : self.pos]

    def value(self):
        kind = self.number(U32)
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        return self.numbers(kind, 1)[0].item()

    def array(self):
        kind, count = self.number(U32), self.number(U64)
        if kind != STRING:
            return self.numbers(kind, count)
        self.need(8 * count)  # before a list of `count` entries is begun
        data, unpack, pos, strings = self.data, U64.unpack_from, self.pos, []
        # `self.string()` written out, for it is half of the time to load a vocabulary.
        for _ in range(count):
            (length,) = unpack(data, pos)
            if length > _MAX_BYTES:
                self.need(length)
            start, pos = pos + 8, pos + 8 + length
            strings.append(data[start:pos])
        self.pos = pos
        self.need(0)
        return strings

    def skip_strings(self, count: int) -> None:
        self.need(8 * count)
        data, unpack, pos = self.data, U64.unpack_from, self.pos
        for _ in range(count):  # written out, as in `array`
            (length,) = unpack(data, pos)
            if length > _MAX_BYTES:
                self.need(length)
            pos += 8 + length
        self.pos = pos
        self.need(0)

    def numbers(self, kind: int, count: int) -> np.ndarray:
        length = self.width(kind) * count
        self.need(length)
        self.pos += length
        return np.frombuffer(self.data[self.pos - length : self.pos], _SCALARS[kind])

    def width(self, kind: int) -> int:
        """Bytes of a number."""
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return np.dtype(_SCALARS[kind]).itemsize

    def skip(self, length: int) -> None:
        self.need(length)
        self.pos += length

    def need(self, length: int) -> None:
        left = self.size - self.pos
        if length > min(left, _MAX_BYTES) or left < 0:
            raise ValueError(
                f"{length} bytes expected at byte {self.pos}, the file has {left} more"
            )
