"""A GGUF file as a source, in parts or not.

Quantised tensors are read as they are (`read_blocks`), or decoded to float32 (`read`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from gemma_jax.config import GemmaConfig

from ..blocks import Blocks
from ..errors import CheckpointError
from ..heads import is_tied
from ..name_table import Table
from ..safetensors_file import DTYPES, read_at
from ..source import TensorInfo
from .blocks import FORMS, to_blocks
from .config import config_from_gguf
from .decode import decode
from .header import GGUFHeader, GGUFTensor, read_gguf_header
from .mmproj import mmproj_table, vision_from_mmproj
from .names import EMBEDDING, HEAD, LAUREL_LEFT, PER_LAYER_TABLE, STACKS, gguf_table, in_stack
from .parts import read_parts
from .sampling import sampling_from_gguf

PLAIN = DTYPES  # the formats agree on these names
ROWS = 256  # that are looked at together for zeros


@dataclass
class GGUFFile:
    """See `Source`.

    Attributes:
      mmproj: The file with the vision tower that goes with it, if that is wanted.
    """

    path: Path
    mmproj: Path | None = None
    config: GemmaConfig = field(init=False)
    table: Table = field(init=False)
    tensors: dict[str, TensorInfo] = field(init=False)
    spoilt: dict[str, str] = field(init=False, default_factory=dict)
    beside_config = None
    format = "GGUF"
    reads_rows = True
    notes = ()

    def __post_init__(self):
        headers = read_parts(self.path)
        self.tensors, self._places = {}, {}
        problems = [p for path, header in headers.items() for p in self._describe(path, header)]
        if problems:
            raise CheckpointError(self.path, problems)
        embedding, laurel = self.tensors.get(EMBEDDING), self.tensors.get(LAUREL_LEFT)
        metadata = next(iter(headers.values())).metadata
        if embedding is None:
            is_tower = metadata.get("general.architecture") == "clip"
            hint = "; it is the tower of one, give that and this as mmproj" if is_tower else ""
            raise CheckpointError(self.path, f"{EMBEDDING} is missing: not a language model{hint}")
        try:
            config = config_from_gguf(
                metadata,
                embedding.shape[0],
                laurel_rank=None if laurel is None else laurel.shape[0],
                per_layer_rows=self._cut_per_layer_table(),
            )
            sampling_from_gguf(metadata)  # refused here, whoever asks for it later
        except ValueError as error:
            raise CheckpointError(self.path, str(error)) from None
        tied = is_tied(self.read, self.tensors, EMBEDDING, HEAD)
        self.config = replace(config, tied_head=tied)
        self.table = gguf_table(self.config)
        if self.mmproj is not None:
            self._add_tower(self.mmproj, metadata, next(iter(headers)))

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        array = self._rows(name, rows)
        return array if array.ndim < 2 else array[:, columns]

    def read_blocks(self, name: str, rows: slice = slice(None)) -> Blocks:
        return to_blocks(self._raw(name, rows), self.tensors[name].encoding)

    def mapped(self, name: str) -> "np.ndarray | MappedRows":
        """One tensor, mapped into memory and not read."""
        info, (path, first_byte) = self.tensors[name], self._places[name]
        if (plain := PLAIN.get(info.encoding)) is not None:
            return np.memmap(path, plain, mode="r", offset=first_byte, shape=info.shape)
        shape = (info.shape[0], info.nbytes // info.shape[0])
        return MappedRows(
            np.memmap(path, np.uint8, mode="r", offset=first_byte, shape=shape), info.encoding
        )

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        info, raw = self.tensors[name], self._raw(name, rows)
        shape = (len(raw), *info.shape[1:])
        plain = PLAIN.get(info.encoding)
        if plain is not None:
            return raw.reshape(-1).view(plain).reshape(shape)
        block_size, block_bytes = _block(info.encoding)
        return decode(raw.reshape(-1, block_bytes), info.encoding, block_size).reshape(shape)

    def _raw(self, name: str, rows: slice) -> np.ndarray:
        """Bytes of some rows: `[rows, blocks, bytes of a block]`, of plain values as of blocks."""
        info, (path, first_byte) = self.tensors[name], self._places[name]
        first, last, _ = rows.indices(info.shape[0])
        row_bytes = info.nbytes // info.shape[0]
        raw = np.empty((last - first) * row_bytes, np.uint8)
        read_at(path, first_byte + first * row_bytes, raw)
        _, block_bytes = _block(info.encoding)
        return raw.reshape(last - first, -1, block_bytes)

    def _add_tower(self, mmproj: Path, metadata: Mapping[str, object], first_part: Path) -> None:
        if (arch := metadata.get("general.architecture")) != "gemma3":
            raise CheckpointError(self.path, f"mmproj goes with a 'gemma3', not with a {arch!r}")
        header = read_gguf_header(mmproj)
        try:
            vision = vision_from_mmproj(header.metadata, first_part, self.config)
        except ValueError as error:
            raise CheckpointError(mmproj, str(error)) from None
        if problems := self._describe(mmproj, header):
            raise CheckpointError(mmproj, problems)
        self.config = replace(self.config, vision=vision)
        self.table += mmproj_table(vision, self.tensors)

    def _cut_per_layer_table(self) -> int | None:
        """Takes the rows of zeros off the end of the per-layer table; how many are left.

        llama.cpp wants as many rows as the embedding has, so its converter fills the table up
        (`Gemma3NModel.modify_tensors`). The model itself takes row 0 for ids beyond its table.
        """
        info = self.tensors.get(PER_LAYER_TABLE)
        if info is None or info.dtype == np.uint8:
            return None
        rows, first = 0, info.shape[0]
        while not rows and first:
            last, first = first, max(0, first - ROWS)
            block = self._rows(PER_LAYER_TABLE, slice(first, last)).reshape(last - first, -1)
            filled = np.flatnonzero(block.any(axis=1))
            rows = first + int(filled[-1]) + 1 if len(filled) else 0
        rows = rows or info.shape[0]
        nbytes = info.nbytes // info.shape[0] * rows
        self.tensors[PER_LAYER_TABLE] = replace(info, shape=(rows, *info.shape[1:]), nbytes=nbytes)
        return rows

    def _describe(self, path: Path, header: GGUFHeader) -> list[str]:
        """Adds the tensors of one file; what is wrong with them."""
        infos, problems = {}, []
        for name, tensor in header.tensors.items():
            try:
                infos[name] = _info(tensor)
            except ValueError as error:
                problems.append(f"{name}: {error}")
                continue
            if tensor.offset + infos[name].nbytes > header.size:
                end = tensor.offset + infos[name].nbytes
                problems.append(f"{name} ends at byte {end}, the file is cut off at {header.size}")
        if not problems and sum(info.nbytes for info in infos.values()) > header.size:
            problems.append("tensors overlap: together they are larger than the file")
        for name, info in infos.items():
            first_byte = header.tensors[name].offset
            self.tensors[name], self._places[name] = info, (path, first_byte)
            if name in STACKS and len(info.shape) == 3:
                self._unstack(name)
        return problems

    def _unstack(self, name: str) -> None:
        """Puts the matrices of a stack in its place, under names of their own."""
        info, (path, first_byte) = self.tensors.pop(name), self._places.pop(name)
        step = info.nbytes // info.shape[0]
        for i in range(info.shape[0]):
            matrix = replace(info, shape=info.shape[1:], nbytes=step)
            self.tensors[in_stack(name, i)] = matrix
            self._places[in_stack(name, i)] = (path, first_byte + i * step)


@dataclass(frozen=True)
class MappedRows:
    """A quantised matrix in its file: an index of rows reads and decodes them.

    Attributes:
      raw: The file, mapped: uint8 `[rows, bytes of a row]`.
    """

    raw: np.ndarray
    encoding: str

    dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """float32 `[*ids.shape, values of a row]`."""
        block_size, block_bytes = _block(self.encoding)
        blocks = np.asarray(self.raw[ids]).reshape(-1, block_bytes)
        return decode(blocks, self.encoding, block_size).reshape(*ids.shape, -1)


def _info(tensor: GGUFTensor) -> TensorInfo:
    gguf = _package()
    try:
        encoding = gguf.GGMLQuantizationType(tensor.type_id).name
        block_size, block_bytes = _block(encoding)
    except (ValueError, KeyError):
        raise ValueError(f"unknown tensor type {tensor.type_id}") from None
    if tensor.shape[-1] % block_size or not math.prod(tensor.shape):
        raise ValueError(f"shape {list(tensor.shape)} is not made of blocks of {block_size}")
    nbytes = math.prod(tensor.shape) // block_size * block_bytes
    form = FORMS.get(encoding) if len(tensor.shape) > 1 else None
    return TensorInfo(tensor.shape, encoding, _decoded_dtype(encoding), nbytes, form)


@cache
def _decoded_dtype(encoding: str) -> np.dtype:
    """What reading gives; uint8, which no parameter accepts, for types that nobody can decode."""
    if encoding in PLAIN:
        return PLAIN[encoding]
    block_size, block_bytes = _block(encoding)
    try:
        decode(np.zeros((1, block_bytes), np.uint8), encoding, block_size)
    except NotImplementedError:
        return np.dtype(np.uint8)
    return np.dtype(np.float32)


@cache
def _block(encoding: str) -> tuple[int, int]:
    """Values and bytes of one block."""
    gguf = _package()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding]]


def _package():
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "GGUF", 'reading GGUF files needs the gguf package: pip install "gemma-jax[gguf]"'
        ) from None
    return gguf
