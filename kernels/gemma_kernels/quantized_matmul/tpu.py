"""Products with quantised matrices on TPU, as Pallas kernels: which of them, and for what.

Up to `FEW` rows of activations, as in decoding, take `tpu_sums.py`, more `tpu_widen.py`. Both want
weights with inputs before outputs (`columns` in `form.py`), as the matrix unit takes them. The
first serves `rows` too, as of tables, but they are loaded transposed, which takes up to twice as
long.

Local letters: R rows; I inputs.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.reference import rounded_to_int8
from gemma_kernels.quantized_matmul.tpu_factors import LANES, SUBLANES
from gemma_kernels.quantized_matmul.tpu_sums import few_rows
from gemma_kernels.quantized_matmul.tpu_widen import Blocks, default_blocks, many_rows

FEW = 8
BFLOAT16_SINCE = 6  # generation whose vector units compute in it


def quantized_matmul_tpu(
    x_RI: jax.Array,
    w: QuantizedMatrix,
    *,
    activations: str = "float",
    layer: jax.Array | None = None,
    outputs: int | None = None,
    blocks: Blocks | None = None,
    integers: bool | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Same result as `reference.quantized_matmul_reference`, for bfloat16.

    Args:
      layer: int32. `w` is a stack of matrices `[L, O, I]`, of which this one is read where it lies.
      outputs: Of a step, for few rows; default: by shape.
      blocks: How to cut a product of many rows; default: by shape.
      integers: Whether products of a few rows are those of int8 numbers; default: if the chip has
        such.
      interpret: Run without a TPU, by Pallas' interpreter.

    Raises:
      NotImplementedError: A call that these kernels do not serve; says why.
    """
    _check(x_RI, w)
    dtype, R = x_RI.dtype, len(x_RI)
    chip = None if interpret else pltpu.get_tpu_info()
    mxu, cores = (chip.mxu_column_size, chip.num_cores) if chip else (LANES, 1)
    if activations == "int8":
        x_RI = rounded_to_int8(x_RI.astype(jnp.float32))
    layer = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    if R > FEW:
        O, I = w.shape[-2:]
        blocks = blocks or default_blocks(R, I, O, w.bits, mxu, cores)
        narrow = chip is not None and chip.generation >= BFLOAT16_SINCE
        return many_rows(x_RI, w, layer, blocks, narrow, interpret)
    if integers is None:
        integers = chip is None or chip.int8_ops_per_second > 0
    return few_rows(x_RI, w, layer, outputs, integers, mxu, cores, interpret).astype(dtype)


def _check(x_RI: jax.Array, w: QuantizedMatrix) -> None:
    (R, I), O, group = x_RI.shape, w.shape[-2], w.group
    if x_RI.dtype != jnp.bfloat16:
        raise NotImplementedError(f"activations are {x_RI.dtype}; it takes bfloat16")
    if w.tiled:
        raise NotImplementedError("weights lie in tiles; it takes columns (to_columns)")
    if R > FEW and not w.columns:
        raise NotImplementedError(f"weights lie in rows; with {R} activations it takes columns")
    if w.table is not None:
        raise NotImplementedError("codes stand for values of a table; it takes them as numbers")
    if I % LANES or (O % LANES and w.columns):
        # Arrays of other widths may lie transposed in memory, and would be copied.
        raise NotImplementedError(f"{I} inputs, {O} outputs; it takes multiples of {LANES}")
    if LANES % group and group % LANES:
        raise NotImplementedError(f"groups of {group}; it takes divisors and multiples of {LANES}")
    if R > FEW and group < 2 * SUBLANES:
        raise NotImplementedError(f"groups of {group}; of more than {FEW} rows it takes 16 or more")
