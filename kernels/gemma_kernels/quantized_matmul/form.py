"""How quantised matrices lie in memory, and what their codes stand for.

    value[o, i] = scale[o, i // group] * (table[code] if there is a table, else code[o, i])
                  + offset[o, i // group], if there are offsets

One form serves them all: int8 and int4 with a scale per channel or per 32, 64, 128 inputs, the
blocks of GGUF files, and tables of 16 values (nf4). Three layouts of it exist:

- Rows: `codes [..., O, I]` of int8, int4 or uint4, `scale` and `offset` `[..., O, I // group]`.
- Columns, for TPUs, whose matrix units take inputs before outputs: `codes [..., I, O]`, `scale` and
  `offset` `[..., I // group, O]`; of float16 the bits, as int16: kernels there know no float16.
- Tiles, for CPUs: 8 rows and 32 columns at a time, so that a product reads each byte once and in
  order, with a row in each lane of a vector. `scale` and `offset` are
  `[..., O / 8, I // group, 8]`.
  8 bits: `codes [..., O / 8, I / 32, 8, 8, 4]`, int8: column `4 q + c` of the 32 at `[q, r, c]`.
  4 bits: `codes [..., O / 8, I / 32, 4, 8, 4]`: column `4 q + c` in the low half of a byte and
  column `16 + 4 q + c` in the high one. Halves are 0 to 15; they stand for that (uint8), or for 8
  less (int8).

Letters: O outputs; I inputs; U tiles of outputs; W tiles of inputs.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

ROWS, COLUMNS = 8, 32  # of a tile
QUAD = 4  # columns of a row that lie together in a tile


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix as codes, `[..., O, I]` whatever the layout; see the top of this file.

    Attributes:
      codes: In one of the layouts.
      scale: float16 (in columns its bits, int16), bfloat16 or float32.
      offset: Like `scale`; `None` for symmetric codes.
      table: float32 `[16]`, what 4-bit codes from 0 to 15 stand for; `None`: for themselves.
      tiled: Whether the layout is that of tiles.
      columns: Whether the layout is that of columns.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gemma_kernels.quantized_matmul import QuantizedMatrix
      >>> w = QuantizedMatrix(jnp.ones((64, 128), jnp.int4), jnp.ones((64, 4), jnp.float16))
      >>> w.shape, w.bits, w.group
      ((64, 128), 4, 32)
      >>> w.to_tiles().codes.shape
      (8, 4, 4, 8, 4)
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None
    table: jax.Array | None = None
    tiled: bool = field(default=False, metadata={"static": True})
    columns: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., O, I]`."""
        if self.columns:
            *stack, I, O = self.codes.shape
            return (*stack, O, I)
        if not self.tiled:
            return self.codes.shape
        *stack, U, W, _, _, _ = self.codes.shape
        return (*stack, U * ROWS, W * COLUMNS)

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        if self.tiled:
            return self.codes.shape[-3]
        return 8 if self.codes.dtype == jnp.int8 else 4

    @property
    def signed(self) -> bool:
        """Whether codes go below 0."""
        return self.codes.dtype in (jnp.int8, jnp.int4)

    @property
    def group(self) -> int:
        """Neighbouring inputs that share a scale."""
        return self.shape[-1] // self.scale.shape[-2 if self.tiled or self.columns else -1]

    def layer(self, index: jax.Array) -> "QuantizedMatrix":
        """One matrix of a stack `[L, O, I]`."""
        parts = self.codes, self.scale, self.offset
        one = [x if x is None else jax.lax.dynamic_index_in_dim(x, index, 0, False) for x in parts]
        return QuantizedMatrix(*one, self.table, self.tiled, self.columns)

    def to_tiles(self) -> "QuantizedMatrix":
        """The same in tiles, bit for bit.

        Raises:
          ValueError: Rows are not a multiple of 8, or columns of 32.
        """
        if self.tiled:
            return self
        if self.columns:
            return self.to_rows().to_tiles()
        *stack, O, I = self.shape
        if O % ROWS or I % COLUMNS:
            raise ValueError(f"[{O}, {I}] is not made of tiles of {ROWS} x {COLUMNS}")
        quads = COLUMNS // QUAD
        codes = self.codes.reshape(*stack, O // ROWS, ROWS, I // COLUMNS, quads, QUAD)
        codes = jnp.moveaxis(codes, -4, -2)  # [..., U, W, quads, ROWS, QUAD]
        if self.bits == 4:
            halves = (codes.astype(jnp.int8) + 8 * self.signed).astype(jnp.uint8)
            codes = halves[..., :4, :, :] | halves[..., 4:, :, :] << 4
            if self.signed:
                codes = jax.lax.bitcast_convert_type(codes, jnp.int8)

        def tiles(x: jax.Array | None) -> jax.Array | None:
            if x is None:
                return None
            return jnp.swapaxes(x.reshape(*stack, O // ROWS, ROWS, x.shape[-1]), -1, -2)

        return QuantizedMatrix(codes, tiles(self.scale), tiles(self.offset), self.table, True)

    def to_rows(self) -> "QuantizedMatrix":
        """The same with the codes of each row next to each other, bit for bit."""
        if self.columns:
            codes = jnp.swapaxes(self.codes, -1, -2)
            return QuantizedMatrix(codes, *self._factors_of_rows, self.table)
        if not self.tiled:
            return self
        codes = self.whole_codes()
        if self.bits == 4:
            codes = codes.astype(jnp.int4 if self.signed else jnp.uint4)
        return QuantizedMatrix(codes, *self._factors_of_rows, self.table)

    def to_columns(self) -> "QuantizedMatrix":
        """The same with the codes of each input next to each other, bit for bit."""
        if self.columns:
            return self
        codes, *factors = self.to_rows()._swapped
        return QuantizedMatrix(codes, *map(_float16_bits, factors), self.table, columns=True)

    def dense(self) -> jax.Array:
        """What the codes stand for, float32 `[..., O, I]`, with one rounding per operation."""
        return self.values(self.whole_codes())

    def whole_codes(self) -> jax.Array:
        """The codes, a byte each, int8 `[..., O, I]`."""
        if self.columns:
            return jnp.swapaxes(self.codes, -1, -2).astype(jnp.int8)
        if not self.tiled:
            return self.codes.astype(jnp.int8)
        # Those of four columns as one number, which XLA moves faster.
        quads = jax.lax.bitcast_convert_type(self.codes, jnp.int32)  # [..., U, W, quads, ROWS]
        codes = jax.lax.bitcast_convert_type(jnp.moveaxis(quads, -1, -3), self.codes.dtype)
        return _columns(codes).reshape(self.shape)

    def values(self, codes: jax.Array) -> jax.Array:
        """What codes stand for that lie as `whole_codes`; see `dense`."""
        scale, offset = self._factors_of_rows
        values = codes.astype(jnp.float32)
        if self.table is not None:
            values = self.table.astype(jnp.float32)[codes.astype(jnp.int32)]
        groups = values.reshape(*scale.shape, -1) * scale.astype(jnp.float32)[..., None]
        if offset is not None:
            groups = groups + offset.astype(jnp.float32)[..., None]
        return groups.reshape(self.shape)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of a matrix that is no stack, float32 `[*ids.shape, I]`."""
        codes, scale, offset = self.codes, *self._factors
        if self.columns:
            parts = (codes, _float16(scale), _float16(offset))
            parts = jax.tree.map(lambda x: jnp.moveaxis(x[:, ids], 0, -1), parts)
        elif not self.tiled:
            parts = jax.tree.map(lambda x: x[ids], (codes, scale, offset))
        else:
            tile, row = ids // ROWS, ids % ROWS
            codes = _columns(codes[tile, :, :, row])
            if self.bits == 4:
                codes = codes.astype(jnp.int4 if self.signed else jnp.uint4)
            scale, offset = (x if x is None else x[tile, :, row] for x in (scale, offset))
            parts = codes, scale, offset
        return QuantizedMatrix(*parts, self.table).dense()

    @property
    def _factors(self) -> tuple[jax.Array, jax.Array | None]:
        return self.scale, self.offset

    @property
    def _factors_of_rows(self) -> tuple[jax.Array, jax.Array | None]:
        """Scales and offsets `[..., O, I // group]`."""
        if not self.tiled and not self.columns:
            return self._factors

        def rows(x: jax.Array | None) -> jax.Array | None:
            if x is None:
                return None
            groups = x.shape[-2]
            return jnp.swapaxes(_float16(x), -1, -2).reshape(*self.shape[:-1], groups)

        return rows(self.scale), rows(self.offset)

    @property
    def _swapped(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        parts = self.codes, *self._factors
        return jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), parts)


def _columns(codes: jax.Array) -> jax.Array:
    """int8 codes of rows `[..., I]` out of theirs in tiles, `[..., W, quads, QUAD]`."""
    if codes.shape[-2] == 4:
        signed = codes.dtype == jnp.int8
        halves = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        codes = jnp.concatenate([halves & 15, halves >> 4], axis=-2).astype(jnp.int8)
        codes = codes - 8 if signed else codes
    return codes.reshape(*codes.shape[:-3], -1)


def _float16(x: jax.Array | None) -> jax.Array | None:
    """The numbers of which `_float16_bits` are the bits."""
    if x is None or x.dtype != jnp.int16:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.float16)


def _float16_bits(x: jax.Array | None) -> jax.Array | None:
    if x is None or x.dtype != jnp.float16:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.int16)


def nbytes(matrix: QuantizedMatrix) -> int:
    """Bytes in memory, where two codes of 4 bits share one."""
    wide = jax.tree.leaves((matrix.scale, matrix.offset, matrix.table))
    codes = math.prod(matrix.shape) * matrix.bits // 8
    return codes + sum(math.prod(a.shape) * a.dtype.itemsize for a in wide)
