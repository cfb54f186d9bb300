"""Reads and writes safetensors files one tensor at a time.

The format (`README.md` of huggingface/safetensors): the header's length in 8 bytes, the header in
JSON, then the tensors, without gaps. The `safetensors` package maps whole files, so that pages of
the file count as memory of the process, and wants all tensors of a file at once for writing. Here
bytes are read and written where they are needed; tests hold both implementations together.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from .errors import CheckpointError
from .source import TensorInfo

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ENCODINGS = {dtype: encoding for encoding, dtype in DTYPES.items()}
# Of parts of quantised weights; no parameter is stored so.
INTEGERS = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_ALL = DTYPES | INTEGERS
_WRITTEN = {dtype: encoding for encoding, dtype in _ALL.items()}
_LENGTH = struct.Struct("<Q")
MAX_RANK = 8
MAX_HEADER = 100 << 20  # the limit of the safetensors package, in bytes


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    offset: int  # in the file


class SafetensorsFile:
    """Headers of one file; `read` fetches tensors.

    Raises:
      CheckpointError: the header does not describe this file, with all that is wrong with it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._size = path.stat().st_size
        header, start = self._header()
        self._places = self._check(header, start)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: place.info for name, place in self._places.items()}

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        place = self._places[name]
        shape, dtype = place.info.shape, place.info.dtype
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        row = math.prod(shape[1:]) * dtype.itemsize
        begin = place.offset + first * row
        left, right, _ = columns.indices(shape[1]) if len(shape) > 1 else (0, 1, 1)
        if len(shape) < 2 or (left, right) == (0, shape[1]):
            out = np.empty((last - first, *shape[1:]) if shape else (), dtype)
            read_at(self.path, begin, out)
        else:  # nothing of the columns between
            out = np.empty((last - first, right - left, *shape[2:]), dtype)
            read_at(self.path, begin + left * (row // shape[1]), out, step=row)
        return out

    def mapped(self, name: str) -> np.ndarray:
        """A tensor as a view of the file: the system reads what of it is used, when it is."""
        place = self._places[name]
        return np.memmap(
            self.path, place.info.dtype, mode="r", offset=place.offset, shape=place.info.shape
        )

    def _header(self) -> tuple[dict, int]:
        with open(self.path, "rb") as file:
            prefix = file.read(_LENGTH.size)
            length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
            if not 0 < length <= min(self._size - _LENGTH.size, MAX_HEADER):
                problem = f"{self._size} bytes, and a header of {length}"
                raise CheckpointError(self.path, f"not a safetensors file, or cut off: {problem}")
            text = file.read(length)
        try:
            header = json.loads(text, object_pairs_hook=_no_repeats)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(self.path, f"the header is not valid JSON: {error}") from None
        if not isinstance(header, dict):
            raise CheckpointError(self.path, "the header is not a JSON object")
        header.pop("__metadata__", None)
        return header, _LENGTH.size + length

    def _check(self, header: dict, start: int) -> dict[str, _Place]:
        problems, places, end = [], {}, start
        for name, entry in header.items():
            try:
                places[name] = _parse_entry(entry, start)
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"{name}: broken header entry: {error!r}")
        for name, place in sorted(places.items(), key=lambda item: item[1].offset):
            if place.offset != end:
                problems.append(f"{name}: its bytes overlap or leave a gap at byte {end}")
            end = place.offset + place.info.nbytes
        if end != self._size and not problems:
            state = "cut off" if end > self._size else "too long"
            problems.append(f"the file is {state}: {self._size} bytes, the header declares {end}")
        if problems:
            raise CheckpointError(self.path, problems)
        return places


def read_at(path: Path, offset: int, out: np.ndarray, step: int | None = None) -> None:
    """Fills `out` with the bytes at `offset`; with a `step`, each row from so many further on.

    Any number of threads may read at a time.

    Not mapped: a mapped file that shrinks kills the process, and its pages count as memory.
    """
    with open(path, "rb", buffering=0) as file:
        for i, row in enumerate([out] if step is None else out):
            view = memoryview(row.reshape(-1).view(np.uint8))
            file.seek(offset + i * (step or 0))
            while view:
                done = file.readinto(view)
                if not done:
                    raise CheckpointError(path, f"the file is cut off at byte {file.tell()}")
                view = view[done:]


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
) -> Iterator[np.ndarray]:
    """Writes `tensors` (name -> shape, dtype) in their order; yields each array once it is written.

    Spelled as the safetensors package spells it, so that equal tensors make equal files.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _WRITTEN[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    with open(path, "wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            yield array


def _parse_entry(entry: dict, start: int) -> _Place:
    encoding, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(shape) > MAX_RANK or not all(_is_size(n) for n in (*shape, begin, end)):
        raise ValueError(f"shape {shape} and data_offsets {[begin, end]} must be sizes")
    # Encodings without a NumPy dtype of ours are for the loader to refuse, if it wants the tensor.
    dtype = _ALL.get(encoding, np.dtype(np.uint8))
    expected = math.prod(shape) * dtype.itemsize
    if encoding in _ALL and end - begin != expected:
        raise ValueError(f"{encoding} of shape {shape} takes {expected} bytes, not {end - begin}")
    return _Place(TensorInfo(tuple(shape), str(encoding), dtype, end - begin), start + begin)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _no_repeats(pairs: list[tuple[str, object]]) -> dict:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)
