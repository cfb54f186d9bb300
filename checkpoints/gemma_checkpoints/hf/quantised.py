"""Quantised matrices of Hugging Face folders, by what `quantization_config` says of them.

Each consists of several tensors. Here they become one, of the name that the plain one would have,
which can be read as blocks or as floats.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from ..blocks import Blocks
from ..json_values import Json
from ..source import TensorInfo
from . import bitsandbytes, compressed_tensors

KEY = "quantization_config"
Read = Callable[..., np.ndarray]  # of a tensor by its short name, all of it or some rows


class QuantisedMatrix(Protocol):
    """One of them.

    Attributes:
      info: Of the matrix as if it were one tensor of float32.
      parts: Names of the tensors that it is made of.
    """

    @property
    def info(self) -> TensorInfo: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    def blocks(self, rows: slice) -> Blocks:
        """Some rows as they are stored, if `info` has a form."""
        ...

    def values(self, rows: slice) -> np.ndarray:
        """Some rows, float32."""
        ...


Found = tuple[Mapping[str, QuantisedMatrix], list[str]]
METHODS: Mapping[str, Callable[..., Found]] = {
    "compressed-tensors": compressed_tensors.matrices,
    "bitsandbytes": bitsandbytes.matrices,
}


def split_quantisation(raw: Json) -> tuple[Json, Json | None]:
    """A `config.json` without what it says of quantised weights, and that."""
    said = raw.get(KEY)
    if not said:
        return raw, None
    return {key: value for key, value in raw.items() if key != KEY}, said


def quantised_matrices(
    said: object, tensors: Mapping[str, TensorInfo], spellings: Mapping[str, str], read: Read
) -> Found:
    """Name of the plain tensor -> what is in its place; and lines on what is done otherwise here.

    Args:
      said: `quantization_config`.
      spellings: Short name -> name in the file.

    Raises:
      ValueError: fields or tensors that are unknown, missing or impossible; an argument for each.
    """
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"{KEY}.quant_method is {method!r}, which is not read; expected "
            f"{' or '.join(METHODS)}; plain weights and GGUF files are read as well"
        )
    return METHODS[method](said, tensors, spellings, read)
