"""Matrices of 4 bits as `bitsandbytes` stores them: a table of 16 values and a scale per 64.

Of a layer there are, after its name:

    weight                               uint8 `[n / 2, 1]`: the first of two codes in the high half
    weight.absmax                        a scale per block of the rows one after another; uint8 if
                                         scales are quantised too
    weight.quant_map                     what codes stand for, float32 `[16]`
    weight.nested_absmax                 of quantised scales: `map[absmax] * nested + offset`
    weight.nested_quant_map
    weight.quant_state.bitsandbytes__nf4 shape, block sizes and offset as JSON

Source: `QuantState` and `dequantize_4bit` in `functional.py` of bitsandbytes 0.50.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..blocks import FLOAT32, BlockForm, Blocks, halves
from ..json_values import Json
from ..source import TensorInfo

Read = Callable[..., np.ndarray]
STATE = ".weight.quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
UNREAD = {
    "quant_method": "read elsewhere",
    "bnb_4bit_compute_dtype": "the arithmetic is that of this library",
    "bnb_4bit_use_double_quant": "the tensors say it",
    "bnb_4bit_quant_type": "the tensors say it",
    "llm_int8_enable_fp32_cpu_offload": "where transformers puts what",
    "llm_int8_has_fp16_weight": "of weights of 8 bits",
    "llm_int8_threshold": "of weights of 8 bits",
    "llm_int8_skip_modules": "the tensors say it",
}
UNSET: Mapping[str, tuple[object, ...]] = {
    "load_in_8bit": (None, False),
    "_load_in_8bit": (None, False),
    "load_in_4bit": (True,),
    "_load_in_4bit": (True,),
    "bnb_4bit_quant_storage": (None, "uint8"),
}
OF_STATE = {"quant_type", "blocksize", "dtype", "shape"}
OF_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclass(frozen=True)
class TableMatrix:
    """See `QuantisedMatrix`.

    Attributes:
      name: Of the tensor of codes.
      state: What its JSON says.
    """

    name: str
    info: TensorInfo
    parts: tuple[str, ...]
    state: Json
    read: Read

    def blocks(self, rows: slice) -> Blocks:
        first, last, _ = rows.indices(self.info.shape[0])
        codes = self._codes(first, last)
        width, size = self.info.shape[1], self.state["blocksize"]
        scales = self._scales(first * width // size, last * width // size)
        form = self.info.form
        assert form is not None
        return Blocks(form, halves(codes), scales.reshape(len(codes), -1))

    def values(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(self.info.shape[0])
        width, size = self.info.shape[1], self.state["blocksize"]
        block = np.arange(first * width, last * width) // size
        scales = self._scales(int(block[0]), int(block[-1]) + 1)[block - block[0]]
        codes = self._codes(first, last)
        return np.array(self.table, np.float32)[codes] * scales.reshape(codes.shape)

    @cached_property
    def table(self) -> tuple[float, ...]:
        return tuple(self.read(f"{self.name}.quant_map").tolist())

    def _codes(self, first: int, last: int) -> np.ndarray:
        """uint8 from 0 to 15, `[rows, columns]`; a row begins in the middle of a byte or not."""
        width = self.info.shape[1]
        begin, end = first * width, last * width
        packed = self.read(self.name, slice(begin // 2, -(-end // 2))).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
        return codes[begin % 2 :][: end - begin].reshape(last - first, width)

    def _scales(self, first: int, last: int) -> np.ndarray:
        """float32, of some blocks."""
        absmax = self.read(f"{self.name}.absmax", slice(first, last))
        if "nested_blocksize" not in self.state:
            return absmax
        outer = self._nested[np.arange(first, last) // self.state["nested_blocksize"]]
        return self._nested_map[absmax] * outer + np.float32(self.state["nested_offset"])

    @cached_property
    def _nested(self) -> np.ndarray:
        return self.read(f"{self.name}.nested_absmax")

    @cached_property
    def _nested_map(self) -> np.ndarray:
        return self.read(f"{self.name}.nested_quant_map")


def matrices(
    said: Json, tensors: Mapping[str, TensorInfo], spellings: Mapping[str, str], read: Read
) -> tuple[dict[str, TableMatrix], list[str]]:
    """See `quantised_matrices`."""
    where = "quantization_config"
    problems = [
        f"{where}.{key} is unknown here" for key in said if key not in UNREAD and key not in UNSET
    ]
    problems += [
        f"{where}.{key} is {said[key]!r:.60}, which is not supported: matrices of 4 bits in uint8 "
        "are read"
        for key, unset in UNSET.items()
        if key in said and said[key] not in unset
    ]
    if problems:
        raise ValueError(*problems)
    found = {}
    for state in [name for name in tensors if STATE in name]:
        layer, kind = state.split(STATE)
        try:
            found[f"{layer}.weight"] = _matrix(f"{layer}.weight", kind, tensors, read)
        except ValueError as error:
            problems.append(f"{spellings[state].split(STATE)[0]}: {error}")
    used = {part for matrix in found.values() for part in matrix.parts}
    problems += [
        f"{name} belongs to no matrix: {name.split('.weight.')[0]}{STATE}nf4 is missing"
        for name in tensors
        if ".weight." in name and name not in used and not problems
    ]
    if not found and not problems:
        problems.append(f"{where} is set, but no tensor is called *{STATE}nf4")
    if problems:
        raise ValueError(*problems)
    return found, []


def _matrix(name: str, kind: str, tensors: Mapping[str, TensorInfo], read: Read) -> TableMatrix:
    if kind not in TYPES:
        raise ValueError(f"codes of type {kind!r:.40}; expected {' or '.join(TYPES)}")
    key = f"{name}.quant_state.bitsandbytes__{kind}"
    state = _state(read(key) if tensors[key].nbytes < 1 << 16 else np.zeros(0, np.uint8))
    shape, size = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    blocks = -(-count // size)
    nested = "nested_blocksize" in state
    expected = {
        name: ("U8", -(-count // 2)),
        f"{name}.absmax": ("U8" if nested else "F32", blocks),
        f"{name}.quant_map": ("F32", 16),
    }
    if nested:
        expected[f"{name}.nested_absmax"] = ("F32", -(-blocks // state["nested_blocksize"]))
        expected[f"{name}.nested_quant_map"] = ("F32", 256)
    for part, (encoding, length) in expected.items():
        info = tensors.get(part)
        if info is None:
            raise ValueError(f"{part.removeprefix(name) or part} is missing")
        if info.encoding != encoding or math.prod(info.shape) != length:
            raise ValueError(
                f"{part.removeprefix(name) or 'weight'} is {info.encoding} {list(info.shape)}; "
                f"expected {length} of {encoding}"
            )
    parts = (*expected, key)
    table = tuple(read(f"{name}.quant_map").tolist())
    if not all(map(math.isfinite, table)):
        raise ValueError("quant_map holds values that are NaN or infinite")
    whole = shape[1] % size == 0 and size % 32 == 0
    form = BlockForm(4, False, size, FLOAT32, table=table) if whole else None
    nbytes = sum(tensors[part].nbytes for part in parts)
    info = TensorInfo(shape, kind, FLOAT32, nbytes, form)
    return TableMatrix(name, info, parts, state, read)


def _state(raw: np.ndarray) -> Json:
    try:
        state = json.loads(raw.tobytes())
    except ValueError:
        raise ValueError("its quant_state is not JSON") from None
    if not isinstance(state, dict) or state.keys() not in (OF_STATE, OF_STATE | OF_NESTED):
        raise ValueError(f"its quant_state must say {', '.join(sorted(OF_STATE))}")
    shape, sizes = state["shape"], [state["blocksize"], state.get("nested_blocksize", 1)]
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_size, [*shape, *sizes])):
        raise ValueError(f"its quant_state has shape {shape!r:.40} and block sizes {sizes!r:.40}")
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"its quant_state has nested_offset {offset!r:.40}")
    return state


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
