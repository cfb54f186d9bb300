"""Products of many rows of activations with quantised matrices on TPU.

Codes are widened on their way into the matrix unit, which beside hundreds of rows hides behind the
product: the vector units widen a piece while the matrix unit works on the one before.

    for rows, for outputs, for inputs:     a tile of codes comes, and activations
        for piece of outputs:
            sums[rows, piece] += sum over pieces of inputs: x[rows, ...] @ (codes * scale + offset)

So each tile is widened again for the next `ROWS` rows, and nothing wide is kept. What costs beside
the codes is to spread a scale over the sublanes of a register; that is done once for each tile
(`_spread`).

Weights are rounded to bfloat16, as XLA does it. Chips whose vector units compute in bfloat16 round
scales as well before they apply them, which is of the same size; not those of matrices with
offsets.

Memory of one core, in VMEM: two buffers of activations, codes, scales and results; the scales of
some outputs in float32, those of a tile spread over sublanes, and the sums in float32.

Local letters: R rows; I inputs; O outputs.
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

ROWS = 512  # of one product
MOST_INPUTS = 2560  # of a tile
PIECE = 256  # inputs and outputs that are widened together
STEP_BYTES = 2 * 2**20  # codes of a step where rows are few


@dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
      rows: Of activations; a multiple of 16.
      inputs: Of a tile; a multiple of 128 that divides those of the matrix.
      outputs: Of a tile; a multiple of `PIECE`.
    """

    rows: int
    inputs: int
    outputs: int


def default_blocks(R: int, I: int, O: int, bits: int, mxu: int, cores: int) -> Blocks:
    """Tiles for whose product a matrix unit of `mxu` inputs needs longer than for their copies."""
    rows = min(pl.cdiv(R, 16) * 16, ROWS)
    inputs = max(n for n in range(LANES, min(I, MOST_INPUTS) + 1, LANES) if I % n == 0)
    most = 4 * mxu if R > LANES else STEP_BYTES * 8 // (bits * inputs)
    return Blocks(rows, inputs, outputs_of_a_step(I, O, most, PIECE, cores))


def many_rows(
    x_RI: jax.Array,
    w: QuantizedMatrix,
    layer: jax.Array,
    blocks: Blocks,
    narrow: bool,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    """`[R, O]` in bfloat16; see `tpu.quantized_matmul_tpu`.

    Args:
      narrow: Whether codes are scaled in bfloat16.
    """
    (R, I), O = x_RI.shape, w.shape[-2]
    factors = [loadable(a) for a in (w.scale, w.offset) if a is not None]
    arrays = [a.reshape(-1, *a.shape[-2:]) for a in (w.codes, *factors)]
    narrow = narrow and len(factors) == 1
    rows, inputs, outputs = blocks.rows, blocks.inputs, blocks.outputs
    x_RI = jnp.pad(x_RI.astype(jnp.bfloat16), ((0, pl.cdiv(R, rows) * rows - R), (0, 0)))
    E, group = I // w.group, min(w.group, LANES)
    spread = (inputs // group, SUBLANES * (1 + narrow), outputs)
    out_RO = pl.pallas_call(
        partial(_kernel, shared=w.group, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(x_RI) // rows, pl.cdiv(O, outputs), I // inputs),
            in_specs=[
                pl.BlockSpec((rows, inputs), lambda r, o, k, layer: (r, k)),
                pl.BlockSpec((None, inputs, outputs), lambda r, o, k, layer: (layer[0], k, o)),
                *[pl.BlockSpec((None, E, outputs), lambda r, o, k, layer: (layer[0], 0, o))]
                * len(factors),
            ],
            out_specs=pl.BlockSpec((rows, outputs), lambda r, o, k, layer: (r, o)),
            scratch_shapes=[
                [pltpu.VMEM((E, outputs), jnp.float32)] * len(factors),
                [pltpu.VMEM(spread, jnp.bfloat16 if narrow else jnp.float32)] * len(factors),
                pltpu.VMEM((rows, outputs), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((len(x_RI), O), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(layer[None], x_RI, *arrays)
    return out_RO[:R]


def _kernel(layer, x_ref, codes_ref, *refs, shared: int, group: int):
    """One step: the product with a tile of weights, of which `shared` inputs have one scale."""
    *factor_refs, out_ref, wide_refs, spread_refs, sums_ref = refs
    inputs, outputs = codes_ref.shape
    k, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(k == 0)
    def _():
        for ref, wide_ref in zip(factor_refs, wide_refs):
            wide_ref[...] = to_float32(ref[...])

    for wide_ref, spread_ref in zip(wide_refs, spread_refs):
        _spread(wide_ref, spread_ref, k, shared // group)
    for first in range(0, outputs, PIECE):
        chunk = pl.ds(first, PIECE)
        y_RO = jnp.where(k == 0, 0.0, sums_ref[:, chunk])
        for start in range(0, inputs, PIECE):
            piece = pl.ds(start, min(PIECE, inputs - start))
            y_RO += lax.dot(
                x_ref[:, piece], _widened(codes_ref, spread_refs, piece, chunk, group),
                precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32,
            )  # fmt: skip
        sums_ref[:, chunk] = y_RO

    @pl.when(k == last)
    def _():
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


def _spread(wide_ref, spread_ref, k, alike: int) -> None:
    """The factors of tile `k`, each on all sublanes of a register, once for `alike` groups."""
    groups, sublanes, outputs = spread_ref.shape
    for g in range(groups):
        factor_1O = wide_ref[pl.ds((k * groups + g) // alike, 1)]
        spread_ref[g] = jnp.broadcast_to(factor_1O, (sublanes, outputs)).astype(spread_ref.dtype)


def _widened(codes_ref, spread_refs, piece, chunk, group: int) -> jax.Array:
    """What the codes of a piece stand for, bfloat16."""
    _, sublanes, _ = spread_refs[0].shape
    groups = pl.ds(piece.start // group, piece.size // group)
    value = codes_ref[piece, chunk].astype(spread_refs[0].dtype)
    value = value.reshape(groups.size, group // sublanes, sublanes, PIECE)
    scale, *offset = [ref[groups, :, chunk][:, None] for ref in spread_refs]
    value = value * scale + offset[0] if offset else value * scale
    return value.reshape(piece.size, PIECE).astype(jnp.bfloat16)
