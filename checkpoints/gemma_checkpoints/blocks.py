"""Quantised tensors of a file as NumPy arrays, on their way into a `QuantizedMatrix`.

All formats come to one: codes of 8 or 4 bits, and a scale (and an offset, or a table of 16 values)
for each group of neighbouring inputs. A source makes `Blocks` of some rows of a tensor, without
rounding; `MatrixBuffer` (`matrix_buffer.py`) puts them where they stay.

In shapes: R rows, I columns, W blocks of 32 columns, U tiles of 8 rows, E groups of a row.
"""

import math
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from gemma_kernels.quantized_matmul.form import COLUMNS, QUAD, ROWS

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


@dataclass(frozen=True)
class BlockForm:
    """How a kind of quantised tensor is kept in memory.

    Attributes:
      bits: Of a code: 4 or 8.
      signed: Whether codes go below 0.
      group: Neighbouring inputs that share a scale.
      scale: Dtype of scales, and of offsets.
      has_offset: Whether each group has an offset.
      table: What the codes from 0 to 15 stand for; `None`: for themselves.
    """

    bits: int
    signed: bool
    group: int
    scale: np.dtype = FLOAT16
    has_offset: bool = False
    table: tuple[float, ...] | None = None

    @property
    def code_dtype(self) -> np.dtype:
        """Of codes in rows."""
        if self.bits == 8:
            return np.dtype(np.int8)
        return np.dtype(ml_dtypes.int4 if self.signed else ml_dtypes.uint4)

    @property
    def tile_dtype(self) -> np.dtype:
        """Of codes in tiles: bytes, which hold one code or two."""
        return np.dtype(np.int8 if self.signed or self.bits == 8 else np.uint8)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix `[..., O, I]` in memory."""
        size = math.prod(shape)
        factors = size // self.group * self.scale.itemsize * (1 + self.has_offset)
        tables = 0 if self.table is None else 4 * len(self.table) * math.prod(shape[:-2])
        return size * self.bits // 8 + factors + tables


@dataclass(frozen=True)
class Blocks:
    """Some rows of a quantised tensor.

    Attributes:
      codes: 8 bits: int8 `[R, W, 32]`. 4 bits: uint8 `[R, W, 16]`, column `j` of 32 in the low half
        of byte `j` and column `16 + j` in the high one, from 0 to 15: 8 more than a signed code.
      scale: `[R, E]`.
      offset: `[R, E]`, if the form has offsets.
    """

    form: BlockForm
    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(R, I)`."""
        return self.codes.shape[0], self.codes.shape[1] * COLUMNS

    def columns(self, cut: slice) -> "Blocks":
        """Some columns, whole blocks and groups of them."""
        first, last, _ = cut.indices(self.shape[1])
        if (first, last) == (0, self.shape[1]):
            return self
        groups = slice(first // self.form.group, last // self.form.group)
        offset = None if self.offset is None else self.offset[:, groups]
        codes = self.codes[:, first // COLUMNS : last // COLUMNS]
        return replace(self, codes=codes, scale=self.scale[:, groups], offset=offset)

    def rows(self) -> np.ndarray:
        """Codes next to each other, `[R, I]`: int8 for those of 8 bits, else int4 or uint4."""
        codes = self._wide_codes()
        if self.form.bits == 4 and self.form.signed:
            codes = (codes - np.uint8(8)).view(np.int8)
        return codes.reshape(self.shape).astype(self.form.code_dtype, copy=False)

    def tiles(self) -> np.ndarray:
        """Codes in tiles (`gemma_kernels.quantized_matmul.form`), `[U, W, 8 or 4, 8, 4]`."""
        R, W, _ = self.codes.shape
        quads = self.codes.view(np.uint32)  # four columns move as one
        quads = quads.reshape(R // ROWS, ROWS, W, -1).transpose(0, 2, 3, 1)
        tiles = np.ascontiguousarray(quads).view(self.form.tile_dtype)
        return tiles.reshape(*quads.shape, QUAD)

    def values(self, out: np.ndarray | None = None) -> np.ndarray:
        """What the codes stand for, float32 `[R, I]`, with one rounding per operation."""
        codes = self._wide_codes()
        if self.form.table is not None:
            codes = np.array(self.form.table, np.float32)[codes]
        elif self.form.bits == 4 and self.form.signed:
            codes = (codes - np.uint8(8)).view(np.int8)
        grouped = codes.reshape(*self.scale.shape, -1)
        result = np.empty(grouped.shape, np.float32) if out is None else out.reshape(grouped.shape)
        np.multiply(grouped, self.scale.astype(np.float32)[..., None], out=result)
        if self.offset is not None:
            result += self.offset.astype(np.float32)[..., None]
        return result.reshape(self.shape)

    def count_non_finite(self) -> int:
        """How many scales and offsets are NaN or infinite."""
        factors = [self.scale] if self.offset is None else [self.scale, self.offset]
        return sum(int(np.count_nonzero(~np.isfinite(one.astype("f4")))) for one in factors)

    def _wide_codes(self) -> np.ndarray:
        """One code a byte, `[R, W, 32]`; those of 4 bits from 0 to 15."""
        if self.form.bits == 8:
            return self.codes
        out = np.empty((*self.codes.shape[:2], COLUMNS), np.uint8)
        np.bitwise_and(self.codes, 15, out=out[..., : COLUMNS // 2])
        np.right_shift(self.codes, 4, out=out[..., COLUMNS // 2 :])
        return out


def halves(codes: np.ndarray) -> np.ndarray:
    """Codes from 0 to 15, uint8 `[R, I]`, two a byte as `Blocks` has them."""
    codes = codes.reshape(len(codes), -1, COLUMNS)
    return codes[..., : COLUMNS // 2] | codes[..., COLUMNS // 2 :] << 4


def row_tiles(factors: np.ndarray) -> np.ndarray:
    """Scales or offsets `[R, E]` as those of tiles, `[U, E, 8]`."""
    R, E = factors.shape
    return np.ascontiguousarray(factors.reshape(R // ROWS, ROWS, E).transpose(0, 2, 1))
