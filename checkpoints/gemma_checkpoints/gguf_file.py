"""Reads the header of a GGUF file: its metadata and the places of its tensors.

The `gguf` package makes an array of every string of the vocabulary, which takes 20 s for Gemma,
and believes every count in the file. Here arrays are stepped over, and nothing is read or allocated
before its length was held against the file. Format: `docs/gguf.md` of ggml-org/ggml.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

MAGIC = b"GGUF"
_COUNT = struct.Struct("<Q")
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_DIMS, MAX_TENSORS, SHORT = 4, 100_000, 4_096


@dataclass(frozen=True)
class GGUFTensor:
    """`shape` is in the order of NumPy: the file lists it backwards. `offset` is in the file."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """What precedes the weights.

    Attributes:
      metadata: Scalars, strings and short arrays; of any other array its length.
      tensors: Name -> place.
      metadata_end: Byte after the metadata.
      size: Bytes of the file.
    """

    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]
    metadata_end: int
    size: int


def read_gguf_header(path: Path) -> GGUFHeader:
    """Raises `CheckpointError` for anything that is not a whole, little-endian GGUF header."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(path, "not a GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(_Cursor(data, len(MAGIC)))
            except (ValueError, struct.error) as error:
                raise CheckpointError(path, f"broken or cut-off GGUF header: {error}") from None


def copy_metadata(source: Path, target: Path) -> None:
    """Writes a GGUF file with the metadata of `source`, vocabulary included, and no tensors."""
    end = read_gguf_header(source).metadata_end
    with open(source, "rb") as file:
        head = bytearray(file.read(end))
    _COUNT.pack_into(head, len(MAGIC) + 4, 0)  # the number of tensors follows the version
    target.write_bytes(head)


def _read(cursor: "_Cursor") -> GGUFHeader:
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"expected version 2 or 3, little-endian, got {version}")
    num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
    if num_tensors > MAX_TENSORS:
        raise ValueError(f"{num_tensors} tensors declared, more than {MAX_TENSORS}")
    # A forged count cannot make this long: each round moves on, and the file ends somewhere.
    metadata, tensors = {}, {}
    for _ in range(num_pairs):
        _add(metadata, cursor.string(), cursor.value(cursor.scalar("I")))
    metadata_end = cursor.pos
    for _ in range(num_tensors):
        _add(tensors, cursor.string(), cursor.tensor())
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {alignment!r}")
    start = -(-cursor.pos // alignment) * alignment
    placed = {
        name: GGUFTensor(tensor.shape, tensor.type_id, start + tensor.offset)
        for name, tensor in tensors.items()
    }
    return GGUFHeader(metadata, placed, metadata_end, cursor.size)


def _add(found: dict, name: str, value: object) -> None:
    if name in found:
        raise ValueError(f"{name!r} occurs twice")
    found[name] = value


class _Cursor:
    """A position in the file; every method reads one thing and moves behind it."""

    def __init__(self, data: mmap.mmap, pos: int):
        self.data, self.pos, self.size = data, pos, len(data)

    def scalar(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.data, self.pos)
        self.pos += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.skip(length)
        return self.data[self.pos - length : self.pos].decode()

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        return self.scalar(_code(kind))

    def array(self) -> list | int:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            self.need(count * 8)
            for _ in range(count):
                self.skip(self.scalar("Q"))
            return count
        width = struct.calcsize("<" + _code(kind))
        self.need(count * width)
        if count <= SHORT:
            return [self.scalar(_code(kind)) for _ in range(count)]
        self.skip(count * width)
        return count

    def tensor(self) -> GGUFTensor:
        rank = self.scalar("I")
        if not 1 <= rank <= MAX_DIMS:
            raise ValueError(f"a tensor of rank {rank}")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        if math.prod(shape) > 1 << 48:
            raise ValueError(f"a tensor of shape {shape}")
        return GGUFTensor(shape, self.scalar("I"), self.scalar("Q"))

    def skip(self, length: int) -> None:
        self.need(length)
        self.pos += length

    def need(self, length: int) -> None:
        left = self.size - self.pos
        if length > left:
            raise ValueError(f"{length} bytes declared at byte {self.pos}, {left} are left")


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _SCALARS[kind]
