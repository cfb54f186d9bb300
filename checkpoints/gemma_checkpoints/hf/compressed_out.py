"""Matrices of a Hugging Face folder, rounded to 4 or 8 bits as `compressed-tensors` stores them.

The matrices of attention and of the feed-forward layers are rounded; embeddings, heads, norms,
towers and what Gemma 3n has beside them stay as they are, and are named in `ignore`. The rule is
that of compressed-tensors for symmetric codes, with float32 in between:

    scale = max |w| / (2^(bits - 1) - 0.5), in the dtype of the weights; 1 where all are 0
    code  = round(w / scale), halves to even, from -2^(bits - 1) to 2^(bits - 1) - 1
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gemma_jax.config import GemmaConfig

from ..json_values import Json
from .compressed_tensors import PACKED, SCALE

_QUANTISED = re.compile(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate|up|down))\.w")
_STORAGE = re.compile(r"int(?P<bits>[48])(:(?P<group>\d+|channel))?")
GROUP = {4: 32, 8: None}  # inputs with one scale where a storage does not say it; `None`: all
SHAPE = "weight_shape"
_TOWERS = ("re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*embed_vision.*", "re:.*embed_audio.*")
_ALTUP = ("re:.*altup.*", "re:.*laurel.*")
_PER_LAYER = (
    "re:.*per_layer_input_gate",
    "re:.*per_layer_projection",
    "re:.*per_layer_model_projection",
)


class PlainTensor(Protocol):
    """A tensor of an export that is not rounded."""

    name: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]: ...

    def array(self, params: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Storage:
    """What a name like `int4:64` says."""

    bits: int
    group: int | None

    @classmethod
    def parse(cls, name: str) -> "Storage":
        """Raises `ValueError` for a name that is none."""
        found = _STORAGE.fullmatch(name)
        if found is None or found["group"] == "0":
            raise ValueError(
                f"{name!r} is no storage of a folder; expected int4, int8, or one of them with a "
                "group of inputs (int4:128, int8:32, int4:channel)"
            )
        bits, group = int(found["bits"]), found["group"]
        if group is None:
            return cls(bits, GROUP[bits])
        return cls(bits, None if group == "channel" else int(group))

    def config(self, cfg: GemmaConfig) -> Json:
        """`quantization_config` of a folder whose matrices are stored so."""
        group = {"strategy": "channel", "group_size": None}
        if self.group is not None:
            group = {"strategy": "group", "group_size": self.group}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        scheme = {"targets": ["Linear"], "weights": weights | group, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme | {"output_activations": None}},
            "ignore": _ignored(cfg),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _ignored(cfg: GemmaConfig) -> list[str]:
    """Names, or expressions, of the linear layers that stay as they are."""
    names = ["lm_head"]
    if cfg.vision is not None or cfg.audio is not None:
        names += _TOWERS
    if cfg.altup is not None:
        names += _ALTUP
    if cfg.per_layer is not None:
        names += _PER_LAYER
    if shared := [str(i) for i, spec in enumerate(cfg.layers) if spec.kv == "shared"]:
        names.append(rf"re:.*layers\.({'|'.join(shared)})\.self_attn\.[kv]_proj")
    return names


@dataclass(frozen=True)
class PackedPart:
    """One of the tensors that a rounded matrix becomes."""

    plain: PlainTensor
    storage: Storage
    part: str

    @property
    def name(self) -> str:
        return f"{self.plain.name.removesuffix('.weight')}.{self.part}"

    @property
    def dtype(self) -> np.dtype:
        kinds = {PACKED: np.dtype(np.int32), SHAPE: np.dtype(np.int64)}
        return kinds.get(self.part, self.plain.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.plain.shape
        if self.part == SHAPE:
            return (2,)
        if self.part == PACKED:
            return (rows, columns * self.storage.bits // 32)
        return (rows, columns // (self.storage.group or columns))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, params: Any) -> np.ndarray:
        if self.part == SHAPE:
            return np.array(self.plain.shape, np.int64)
        wide = self.plain.array(params)
        codes, scale = rounded(wide, self.storage.bits, self.storage.group)
        return scale if self.part == SCALE else pack(codes, self.storage.bits)


def compressed(tensors: Iterable[tuple[str | None, PlainTensor]], storage: Storage) -> list[Any]:
    """The tensors of an export, with three in the place of each matrix that is rounded.

    Args:
      tensors: Our name, if the model has such a parameter, and the tensor.

    Raises:
      ValueError: Groups do not divide rows.
    """
    found = []
    for ours, tensor in tensors:
        if ours is None or not _QUANTISED.fullmatch(ours):
            found.append(tensor)
            continue
        columns = tensor.shape[1]
        if columns % (storage.group or 8):
            raise ValueError(
                f"{tensor.name}: groups of {storage.group or 8} do not divide rows of {columns}"
            )
        found += [PackedPart(tensor, storage, part) for part in (PACKED, SCALE, SHAPE)]
    return found


def rounded(wide: np.ndarray, bits: int, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes, int8 `[rows, columns]`, and scales in the dtype of the matrix; see the top."""
    high = 1 << (bits - 1)
    groups = wide.astype(np.float32).reshape(len(wide), -1, group or wide.shape[1])
    largest = np.abs(groups).max(axis=-1)
    scale = np.where(largest == 0, 1, largest / np.float32(high - 0.5)).astype(wide.dtype)
    scale = np.where(scale == 0, wide.dtype.type(1), scale)
    codes = np.rint(groups / scale.astype(np.float32)[..., None])
    return np.clip(codes, -high, high - 1).astype(np.int8).reshape(wide.shape), scale


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as words of int32 along the last axis, low bits first, `2^(bits - 1)` more each."""
    raised = (codes + np.int8(-(1 << (bits - 1)) if bits == 8 else 8)).view(np.uint8)
    if bits == 4:
        raised = raised[:, ::2] | raised[:, 1::2] << 4
    return np.ascontiguousarray(raised).view(np.int32)
