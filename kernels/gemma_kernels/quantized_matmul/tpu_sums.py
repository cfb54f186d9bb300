"""Products of a few rows of activations with quantised matrices on TPU.

Decoding is bound by reading the weights, so the kernel has to keep up with that. To multiply every
code by its scale takes more of the vector units than they can do in that time; so codes enter the
matrix unit as they are, and scales are applied to sums. A pass of the matrix unit sums over 128 or
256 inputs, several groups. To keep them apart, each row of activations is given once per group,
with zeros outside it:

    inputs of a tile   |  group 0  |  group 1  |  group 2  |  group 3  |
    row 0              |  x  x  x  |           |           |           |   -> times scale[0]
                       |           |  x  x  x  |           |           |   -> times scale[1]
                       |           |           |  x  x  x  |           |   -> times scale[2]
                       |           |           |           |  x  x  x  |   -> times scale[3]

These rows cost next to nothing: while a tile of weights is loaded into the matrix unit, 16 to 64 of
them stream past the one before. Groups of a tile lie on the 8 sublanes of a register, as their
scales do: 8 groups of one row, 4 of two, so that one multiplication serves them all; sums over
groups are taken once, at the end.

Chips with products of int8 numbers take codes as such, and activations in two digits of base 128
and a unit per group, finer than bfloat16 (`_digits`). Of more rows than a few, two digits are more
work than bfloat16 codes. A tpu7x has no such products; it takes 4-bit codes as float8_e4m3fn, which
has all numbers from -8 to 15, and those of 8 bits as bfloat16; activations stay as they are.

Memory of one core, in VMEM: two buffers of codes and scales (`STEP_BYTES` of codes), the scales in
float32, and the spread activations.

Local letters: R rows; I inputs; O outputs; E groups of inputs; W tiles of inputs; M rows spread
over the groups of a tile.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.tpu_factors import (
    LANES,
    SUBLANES,
    VMEM,
    loadable,
    outputs_of_a_step,
    to_float32,
)

CHUNK = 256  # outputs that are summed up together
# Codes of a step, by inputs of a matrix unit's pass: chips with larger ones have faster memory.
STEP_BYTES = {128: 2 * 2**20, 256: 4 * 2**20}
BASE = 128  # of a digit
# Rows up to which two digits are less work than bfloat16 codes, by inputs of a matrix unit's pass.
MOST_DIGITS = {128: 8, 256: 4}


@dataclass(frozen=True)
class _Plan:
    """What the kernel knows at compile time.

    Attributes:
      rows: Rows of activations, a multiple of `together`.
      inputs: Of the matrix.
      shared: Inputs that share a scale.
      group: Inputs that share a row: as many, or `LANES` of them.
      groups: Of a tile; 1, 2, 4 or 8.
      outputs: Of a step.
      product: Dtype in which codes enter the matrix unit.
      columns: Whether inputs come before outputs.
    """

    rows: int
    inputs: int
    shared: int
    group: int
    groups: int
    outputs: int
    product: jnp.dtype
    columns: bool

    @property
    def integers(self) -> bool:
        """Whether products are those of int8 numbers."""
        return self.product == jnp.int8

    @property
    def depth(self) -> int:
        """Inputs of a tile."""
        return self.groups * self.group

    @property
    def tiles(self) -> int:
        """Of inputs; the last one may be short."""
        return pl.cdiv(self.inputs, self.depth)

    @property
    def together(self) -> int:
        """Rows of activations whose groups of a tile fill the sublanes of a register."""
        return SUBLANES // self.groups

    @property
    def spread(self) -> int:
        """Rows after spreading, of one digit."""
        return self.groups * self.rows


def few_rows(
    x_RI: jax.Array,
    w: QuantizedMatrix,
    layer: jax.Array,
    outputs: int | None,
    integers: bool,
    mxu: int,
    cores: int,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """`[R, O]` in float32; see `tpu.quantized_matmul_tpu`.

    Args:
      x_RI: bfloat16, or float32, of which as much is kept as the products take.
      mxu: Inputs of a pass of the matrix unit.
      cores: Among which the steps are divided.
    """
    (R, I), O = x_RI.shape, w.shape[-2]
    if integers:
        product = jnp.int8 if R <= MOST_DIGITS[mxu] else jnp.bfloat16
    else:
        product = jnp.bfloat16 if w.bits == 8 else jnp.float8_e4m3fn
    group = min(w.group, LANES)
    groups = SUBLANES if R == 1 else min(mxu // group, SUBLANES)
    together = SUBLANES // groups
    plan = _Plan(
        rows=pl.cdiv(R, together) * together,
        inputs=I,
        shared=w.group,
        group=group,
        groups=groups,
        outputs=outputs or default_outputs(I, O, w.bits, mxu, cores),
        product=jnp.dtype(product),
        columns=w.columns,
    )
    x_RI = jnp.pad(x_RI, ((0, plan.rows - R), (0, 0)))
    arrays = [a.reshape(-1, *a.shape[-2:]) for a in (w.codes, w.scale, w.offset) if a is not None]
    codes, *factors = arrays
    if not w.columns:  # factors are few, and rather transposed
        factors = [lax.dynamic_index_in_dim(a, layer, 0).mT for a in factors]
    spread = _spread(x_RI, plan, w.offset is not None)
    return _run(layer, spread, codes, list(map(loadable, factors)), plan, interpret)[:R]


def default_outputs(I: int, O: int, bits: int, mxu: int, cores: int) -> int:
    """Outputs of a step: up to `STEP_BYTES` of codes, and where these are enough for it, of two
    steps at least, so that copies hide behind work."""
    most = max(STEP_BYTES[mxu] * 8 // (bits * I), CHUNK)
    if O > most // 2 * cores:
        most = min(most, max(O // (2 * cores), most // 4, CHUNK))
    return outputs_of_a_step(I, O, most, LANES, cores)


def _spread(x_RI: jax.Array, plan: _Plan, with_sums: bool) -> list[jax.Array]:
    """Activations as the kernel takes them: rows `[W, digits * M, C]`, row before group; with
    digits their units, and for offsets the sums of groups, float32 `[W, M, 1]`."""
    R, E = plan.rows, plan.groups
    x_RI = jnp.pad(x_RI, ((0, 0), (0, plan.tiles * plan.depth - plan.inputs)))
    x_RWEG = x_RI.reshape(R, plan.tiles, E, plan.group)
    own_EE1 = jnp.eye(E, dtype=bool)[:, :, None]

    def rows(x_RWEn):
        return jnp.moveaxis(x_RWEn, 0, 1).reshape(plan.tiles, R * E, -1)

    def spread(x_RWEG):
        x_RWEEG = jnp.where(own_EE1, x_RWEG[:, :, None], jnp.zeros((), x_RWEG.dtype))
        return rows(x_RWEEG.reshape(R, plan.tiles, E, -1))

    if plan.integers:
        high, low, unit_RWE1 = _digits(x_RWEG)
        out = [jnp.concatenate([spread(high), spread(low)], axis=1), rows(unit_RWE1)]
    else:
        out = [spread(x_RWEG.astype(jnp.bfloat16))]
    if with_sums:
        out.append(rows(jnp.sum(x_RWEG.astype(jnp.float32), axis=-1, keepdims=True)))
    return out


def _digits(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x` in units of its group: high digit, low digit, both int8, and the float32 unit.

    Off by half a unit at most, of which the largest number of a group has 127 * BASE.
    """
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.maximum(most, jnp.finfo(jnp.float32).tiny * BASE**2) / (127 * BASE)
    number = jnp.round(x / unit).astype(jnp.int32)
    high = (number + BASE // 2) // BASE
    return high.astype(jnp.int8), (number - high * BASE).astype(jnp.int8), unit


def _run(layer, spread, codes, factors_LEO, plan: _Plan, interpret) -> jax.Array:
    """`[R, O]` float32; codes `[L, I, O]` or `[L, O, I]`, factors perhaps of one layer alone."""
    O, offsets = factors_LEO[0].shape[2], len(factors_LEO) > 1

    def whole(a):
        return pl.BlockSpec(a.shape, lambda step, layer: (0,) * a.ndim)

    def columns(a):
        own = (lambda layer: layer[0]) if len(a) > 1 else (lambda layer: 0)
        return pl.BlockSpec((None, a.shape[1], plan.outputs), lambda i, layer: (own(layer), 0, i))

    rows = pl.BlockSpec((None, plan.outputs, plan.inputs), lambda i, layer: (layer[0], i, 0))
    codes_spec = columns(codes) if plan.columns else rows
    wide = pltpu.VMEM((plan.tiles, SUBLANES, plan.outputs), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, plan=plan, offsets=offsets),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(O, plan.outputs),),
            in_specs=[*map(whole, spread), codes_spec, *map(columns, factors_LEO)],
            out_specs=pl.BlockSpec((plan.rows, plan.outputs), lambda step, layer: (0, step)),
            scratch_shapes=[[wide] * (1 + offsets)],
        ),
        out_shape=jax.ShapeDtypeStruct((plan.rows, O), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(layer[None], *spread, codes, *factors_LEO)


def _kernel(layer, *refs, plan: _Plan, offsets: bool):
    """One step: some outputs, over all inputs."""
    *refs, out_ref, wide_refs = refs
    operands, (codes_ref, *factor_refs) = refs[: -2 - offsets], refs[-2 - offsets :]
    for ref, wide_ref in zip(factor_refs, wide_refs):
        _widen(ref, wide_ref, plan)
    for first in range(0, plan.outputs, CHUNK):
        chunk = pl.ds(first, min(CHUNK, plan.outputs - first))
        parts = [0.0] * (plan.rows // plan.together)
        for tile in range(plan.tiles):
            sums = _group_sums(operands, codes_ref, tile, chunk, plan, offsets)
            for n in range(len(parts)):
                rows = slice(n * SUBLANES, (n + 1) * SUBLANES)
                for sum_MO, wide_ref in zip(sums, wide_refs):
                    parts[n] += sum_MO[rows] * wide_ref[tile, :, chunk]
        for n, part in enumerate(parts):
            y_RO = jnp.sum(part.reshape(plan.together, plan.groups, -1), axis=1)
            out_ref[n * plan.together : (n + 1) * plan.together, chunk] = y_RO


def _widen(ref, wide_ref, plan: _Plan) -> None:
    """Factors of each tile in float32, on the sublanes of their groups in each row."""
    for tile in range(plan.tiles):
        first = tile * plan.groups
        count = min(plan.groups, plan.inputs // plan.group - first)
        if plan.group == plan.shared:
            factor_EO = to_float32(ref[first : first + count])
        else:
            rows = [(first + n) * plan.group // plan.shared for n in range(count)]
            factor_EO = jnp.concatenate([to_float32(ref[row : row + 1]) for row in rows])
        for row in range(plan.together):
            at = row * plan.groups
            wide_ref[tile, at : at + count] = factor_EO
            if count < plan.groups:
                rest = (plan.groups - count, plan.outputs)
                wide_ref[tile, at + count : at + plan.groups] = jnp.zeros(rest, jnp.float32)


def _group_sums(operands, codes_ref, tile, chunk, plan: _Plan, offsets: bool) -> list[jax.Array]:
    """Of a tile: what scales apply to, `[M, outputs]`, and what offsets do, `[M, 1]`."""
    x_ref, start = operands[0], tile * plan.depth
    depth = min(plan.depth, plan.inputs - start)
    inputs = pl.ds(start, depth)
    codes = codes_ref[inputs, chunk] if plan.columns else codes_ref[chunk, inputs]
    sum_MO = lax.dot_general(
        x_ref[tile, :, :depth], codes.astype(plan.product),
        (((1,), (0 if plan.columns else 1,)), ((), ())),
        precision=lax.Precision.DEFAULT,  # others may be set outside
        preferred_element_type=jnp.int32 if plan.integers else jnp.float32,
    )  # fmt: skip
    if plan.integers:
        high, low = sum_MO[: plan.spread], sum_MO[plan.spread :]
        sum_MO = (high * BASE + low).astype(jnp.float32) * operands[1][tile]
    return [sum_MO, operands[-1][tile]] if offsets else [sum_MO]
