"""Reads the header of a GGUF file: its metadata and the places of its tensors.

The cursor is the tokenizer's (`gemma_jax.text.gguf_header`), which holds every length against the
file before it reads or allocates. Long arrays are stepped over.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gemma_jax.text.gguf_header import MAGIC, STRING, U32, U64, Cursor

from ..errors import CheckpointError

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
    U64.pack_into(head, len(MAGIC) + 4, 0)  # the number of tensors follows the version
    target.write_bytes(head)


def _read(cursor: "_Cursor") -> GGUFHeader:
    num_tensors, num_pairs = cursor.counts()
    if num_tensors > MAX_TENSORS:
        raise ValueError(f"{num_tensors} tensors declared, more than {MAX_TENSORS}")
    metadata = cursor.metadata(num_pairs)
    metadata_end = cursor.pos
    tensors = cursor.entries(num_tensors, cursor.tensor)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {alignment!r}")
    start = -(-cursor.pos // alignment) * alignment
    placed = {
        name: GGUFTensor(tensor.shape, tensor.type_id, start + tensor.offset)
        for name, tensor in tensors.items()
    }
    return GGUFHeader(metadata, placed, metadata_end, cursor.size)


class _Cursor(Cursor):
    """Steps over the vocabulary, decodes what is left, and goes on to the tensors."""

    def value(self):
        value = super().value()
        return value.decode() if isinstance(value, bytes) else value

    def array(self) -> list | int:
        start = self.pos
        kind, count = self.number(U32), self.number(U64)
        if kind == STRING:
            self.skip_strings(count)
            return count
        if count > SHORT:
            self.skip(count * self.width(kind))
            return count
        self.pos = start
        return super().array().tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def tensor(self) -> GGUFTensor:
        rank = self.number(U32)
        if not 1 <= rank <= MAX_DIMS:
            raise ValueError(f"a tensor of rank {rank}")
        shape = tuple(self.number(U64) for _ in range(rank))[::-1]
        if math.prod(shape) > 1 << 48:
            raise ValueError(f"a tensor of shape {shape}")
        return GGUFTensor(shape, self.number(U32), self.number(U64))
