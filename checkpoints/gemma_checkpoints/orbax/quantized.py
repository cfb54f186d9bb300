"""Quantised weights in folders of ours: their codes and scales as they are, in rows.

An array `NAME` becomes `NAME:codes` (those of 4 bits two a byte, even columns in the low half),
`NAME:scale`, and `NAME:offset`, `NAME:table` where there are such; the manifest says the rest.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma_jax.weights.quantized import QuantizedWeight
from gemma_kernels.quantized_matmul import QuantizedMatrix

PARTS = ("codes", "scale", "offset", "table")


@dataclass(frozen=True)
class Quantised:
    """What the manifest says of a quantised parameter of one layer.

    Attributes:
      shape: Of the parameter.
      num_inputs: Its last axes, which are one axis of the codes.
      bits: Of a code: 4 or 8.
      signed: Whether codes go below 0.
    """

    shape: tuple[int, ...]
    num_inputs: int
    bits: int
    signed: bool

    @property
    def encoding(self) -> str:
        """As `info` and errors call it."""
        return f"{'' if self.signed else 'U'}INT{self.bits}"

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Of the codes: output axes, and one of all inputs."""
        outputs = self.shape[: len(self.shape) - self.num_inputs]
        return (*outputs, math.prod(self.shape[len(outputs) :]))

    def matrix(self, parts: dict[str, np.ndarray]) -> QuantizedMatrix:
        """The matrix that was saved, as NumPy arrays.

        Raises:
          ValueError: Parts that do not fit together, or scales that are no numbers.
        """
        codes, scale = parts["codes"], parts["scale"]
        *outputs, I = self.rows_shape
        stored = (*outputs, -(-I // 2) if self.bits == 4 else I)
        groups = scale.shape[-1] if scale.ndim else 0
        if codes.shape != stored or scale.shape[:-1] != (*outputs,) or not groups or I % groups:
            raise ValueError(f"has codes {list(codes.shape)} and scales {list(scale.shape)}")
        factors = [parts[name] for name in ("scale", "offset", "table") if name in parts]
        if broken := sum(np.count_nonzero(~np.isfinite(a.astype(np.float32))) for a in factors):
            raise ValueError(f"{broken} scales are NaN or infinite")
        if self.bits == 4:
            codes = _unpacked(codes, I, self.signed)
        return QuantizedMatrix(codes, scale, parts.get("offset"), parts.get("table"))  # pyright: ignore[reportArgumentType]


def to_save(weight: QuantizedWeight, row: int | None) -> tuple[Quantised, dict[str, Any]]:
    """One layer of a weight, and its arrays by the ends of their names."""
    if row is not None:
        weight = jax.tree.map(lambda a: a[row], weight)
    matrix = weight.in_rows().matrix
    facts = Quantised(weight.shape, len(weight.inputs), matrix.bits, matrix.signed)
    codes = _packed(matrix.codes) if matrix.bits == 4 else matrix.codes
    arrays = (codes, matrix.scale, matrix.offset, matrix.table)
    return facts, {name: a for name, a in zip(PARTS, arrays) if a is not None}


def facts_in(manifest: dict[str, Any]) -> dict[str, Quantised]:
    """Name -> what the manifest says of it; nothing in folders of floats."""
    said = manifest.get("quantised", {})
    return {name: Quantised(**one | {"shape": tuple(one["shape"])}) for name, one in said.items()}


def for_manifest(facts: dict[str, Quantised]) -> dict[str, Any]:
    """What `facts_in` reads."""
    return {"quantised": {name: asdict(one) for name, one in facts.items()}} if facts else {}


@jax.jit
def _packed(codes: jax.Array) -> jax.Array:
    halves = codes.astype(jnp.int8).astype(jnp.uint8) & 15
    if halves.shape[-1] % 2:
        halves = jnp.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, 1)])
    return halves[..., ::2] | halves[..., 1::2] << 4


def _unpacked(codes: np.ndarray, columns: int, signed: bool) -> np.ndarray:
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    halves = halves[..., :columns].astype(np.int8)
    if signed:
        return np.where(halves > 7, halves - 16, halves).astype(ml_dtypes.int4)
    return halves.astype(ml_dtypes.uint4)
