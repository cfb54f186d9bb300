"""Products with quantised matrices on Hopper, as a Mosaic GPU kernel.

Outputs are rows of the first operand of a wgmma, activations the columns of the second, so that one
row of activations costs 8 columns and not 64. Codes are widened in registers, where the tensor
cores take their first operand from; what they stand for beside a scale is exact. Scales apply to
the sums of groups, which are fewer than codes by far:

    inputs of a block         | group 0 | group 1 | group 2 | group 3 |
    64 outputs, warpgroup 0   | codes   | ...                           sums += (codes x) * scale
    64 outputs, warpgroup 1   |                                         for each group
    loading warpgroup         codes and activations of the next blocks

Inputs are split among thread blocks where outputs alone do not fill the chip; XLA adds what they
get up.

Shared memory: `stages` times 128 outputs of codes, 16 KB for int8 and 8 KB for 4 bits, and
activations, up to 32 KB; results, up to 64 KB.

Local letters: R rows of activations; I inputs; O outputs; E groups of inputs; P splits.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma_kernels.mosaic_gpu import (
    COLUMNS,
    MATRIX,
    PIECE,
    ROWS,
    Ops,
    across,
    compiler_params,
    down,
    interpreter,
    matrix_smem,
)
from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.reference import rounded_to_int8

PROCESSORS = 132  # of an H100 or H200 (SXM)
COMPUTE = 2  # warpgroups that compute
BLOCK = 128  # inputs of a block
CHUNK = 32  # inputs that fewest share a scale
MOST_ROWS = 128  # of one product
STAGES = 4


@dataclass(frozen=True)
class _Plan:
    """What the kernel knows at compile time.

    Attributes:
      rows: Of activations, in one product; a multiple of 8.
      blocks: Of inputs.
      each: Of these, for one split.
      group: Inputs that share a scale.
      piece: Inputs whose codes are widened together; 32 bytes at least.
      offsets: Whether groups have offsets.
    """

    rows: int
    blocks: int
    each: int
    group: int
    piece: int
    offsets: bool
    ops: Ops


def quantized_matmul_hopper(
    x_RI: jax.Array,
    w: QuantizedMatrix,
    *,
    activations: str = "float",
    layer: jax.Array | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Same result as `reference.quantized_matmul_reference`, for bfloat16.

    Args:
      layer: int32. `w` is a stack of matrices `[L, O, I]`, of which this one is read where it lies.
      splits: Parts of the inputs, each for a thread block of its own; default: to fill the chip.
      interpret: Run on a CPU, by the interpreter of Mosaic GPU.

    Raises:
      NotImplementedError: A call that this kernel does not serve; says why.
    """
    _check(x_RI, w)
    (R, I), O = x_RI.shape, w.shape[-2]
    dtype = x_RI.dtype
    if activations == "int8":
        x_RI = rounded_to_int8(x_RI.astype(jnp.float32)).astype(dtype)
    rows = min(pl.cdiv(R, 8) * 8, MOST_ROWS)
    tiles = pl.cdiv(R, rows)
    blocks = I // BLOCK
    splits = splits or min(max(PROCESSORS // (O // (COMPUTE * PIECE) * tiles), 1), blocks)
    each = pl.cdiv(blocks, splits)
    piece = max(min(w.group, BLOCK), 32 * 8 // w.bits)
    plan = _Plan(rows, blocks, each, w.group, piece, w.offset is not None, Ops(interpret))
    x_RI = jnp.pad(x_RI, ((0, tiles * rows - R), (0, 0)))
    codes, *factors = (
        a.reshape(-1, a.shape[-1]) for a in (w.codes, w.scale, w.offset) if a is not None
    )
    if plan.offsets:
        sums_RE = jnp.sum(x_RI.astype(jnp.float32).reshape(len(x_RI), -1, w.group), axis=-1)
        factors.append(sums_RE.T)
    # Outputs of a layer are some of those of a matrix of more.
    row = jnp.full(2, 0 if layer is None else jnp.asarray(layer, jnp.int32) * O, jnp.int32)
    out_POR = _run(row, x_RI, codes, factors, (pl.cdiv(blocks, each), O, len(x_RI)), plan)
    return jnp.sum(out_POR, axis=0).T[:R].astype(dtype)


def _check(x_RI: jax.Array, w: QuantizedMatrix) -> None:
    I, O, group = x_RI.shape[1], w.shape[-2], w.group
    if x_RI.dtype != jnp.bfloat16:
        raise NotImplementedError(f"activations are {x_RI.dtype}; it takes bfloat16")
    if w.tiled or w.columns:
        layout = "tiles" if w.tiled else "columns"
        raise NotImplementedError(f"weights lie in {layout}; it takes rows (to_rows)")
    if w.table is not None:
        raise NotImplementedError("codes stand for values of a table; it takes them as numbers")
    if I % BLOCK or O % (COMPUTE * PIECE):
        raise NotImplementedError(f"{I} inputs, {O} outputs; it takes multiples of {BLOCK}")
    if group % CHUNK or (BLOCK % group and group % BLOCK):
        raise NotImplementedError(f"groups of {group}; it takes 32, 64 and multiples of {BLOCK}")


def _run(row, x_RI, codes_OI, factors, shape: tuple[int, int, int], plan: _Plan) -> jax.Array:
    """Sums of each split, float32 `shape = [P, O, R]`; of codes from `row` on."""
    interpret = plan.ops.interpret
    splits, O, R = shape
    columns = min(plan.group, PIECE)  # of one wgmma's swizzle: its slices are whole
    scratch = dict(
        x_smem=matrix_smem((STAGES, plan.rows, BLOCK), x_RI.dtype, interpret, columns),
        codes_smem=_codes_smem((STAGES, COMPUTE * PIECE, BLOCK), codes_OI.dtype, plan),
        out_smem=plgpu.SMEM((COMPUTE, PIECE, plan.rows), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
    )
    return plgpu.kernel(
        partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_types=scratch,
        grid=(O // (COMPUTE * PIECE), splits, R // plan.rows),
        grid_names=("outputs", "split", "tile"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter() if interpret else None,
        kernel_name="quantized_matmul_hopper",
    )(row, x_RI, codes_OI, *factors)


def _codes_smem(shape: tuple[int, ...], dtype, plan: _Plan):
    """Shared memory for codes, in pieces of a group, as they are widened."""
    if plan.ops.interpret:
        return plgpu.SMEM(shape, dtype)
    row = plan.piece if dtype == jnp.int8 else plan.piece // 2  # bytes
    transforms = (plgpu.TilingTransform((8, plan.piece)), plgpu.SwizzleTransform(row))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _kernel(row_gmem, x_gmem, codes_gmem, *refs, plan: _Plan, **scratch):
    *factors_gmem, out_gmem = refs
    outputs, split, tile = (lax.axis_index(name) for name in ("outputs", "split", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    row, start = row_gmem[0], split * plan.each
    count = lax.min(plan.each, plan.blocks - start)
    rows = pl.ds(tile * plan.rows, plan.rows)
    first = outputs * COMPUTE * PIECE

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own = pl.ds(first + warpgroup * PIECE, PIECE)
        read = pl.ds(row + own.start, PIECE)
        total = _multiply(warpgroup, read, rows, start, count, factors_gmem, scratch, plan)
        out_smem = scratch["out_smem"].at[warpgroup]
        out_smem[...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[split, own, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        both = pl.ds(pl.multiple_of(row + first, PIECE), COMPUTE * PIECE)
        _load(x_gmem.at[rows], codes_gmem.at[both], start, count, scratch)


def _load(x_gmem, codes_gmem, start, count, scratch):
    """The loading warpgroup."""
    full, free = scratch["full"], scratch["free"]

    @pl.loop(0, count)
    def _(turn):
        slot = lax.rem(turn, STAGES)
        pl.when(turn >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
        inputs = pl.ds((start + turn) * BLOCK, BLOCK)
        for gmem, smem in ((codes_gmem, "codes_smem"), (x_gmem, "x_smem")):
            plgpu.copy_gmem_to_smem(gmem.at[:, inputs], scratch[smem].at[slot], full.at[slot])

    for stage in range(STAGES):  # nothing is left unobserved
        pl.when(stage < count)(partial(plgpu.barrier_wait, free.at[stage]))


def _multiply(warpgroup, own, rows, start, count, factors_gmem, scratch, plan: _Plan):
    """Sums of 64 outputs, `[64, rows]`."""
    ops, group = plan.ops, min(plan.group, BLOCK)

    def step(turn, total):
        slot = lax.rem(turn, STAGES)
        plgpu.barrier_wait(scratch["full"].at[slot])
        codes_smem = scratch["codes_smem"].at[slot, pl.ds(warpgroup * PIECE, PIECE)]
        for at in range(0, BLOCK, group):
            if at % plan.piece == 0:
                codes = codes_smem[:, at : at + plan.piece].astype(jnp.bfloat16)
            own_codes = codes[:, at % plan.piece : at % plan.piece + group]
            part = ops.product_with_rows(own_codes, scratch["x_smem"].at[slot, :, pl.ds(at, group)])
            number = lax.div((start + turn) * BLOCK + at, plan.group)
            scale = ops.load(factors_gmem[0].at[own, number], ROWS).astype(jnp.float32)
            total = total + part * down(scale, part)
            if plan.offsets:
                offset = ops.load(factors_gmem[1].at[own, number], ROWS).astype(jnp.float32)
                sums = ops.load(factors_gmem[2].at[number, rows], COLUMNS)
                total = total + down(offset, part) * across(sums, part)
        plgpu.barrier_arrive(scratch["free"].at[slot])
        return total

    return lax.fori_loop(0, count, step, ops.full((PIECE, plan.rows), 0, MATRIX))
