"""The product with tiles, as JAX sees it.

Local letters: R rows of activations; I inputs; O outputs.
"""

from functools import cache

import jax
import jax.numpy as jnp

from gemma_kernels.platform import require
from gemma_kernels.quantized_matmul.cpu.library import TARGETS, register
from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.xla import quantized_matmul_xla

FEWEST_COLUMNS = 16  # that a scale may stand for
MANY_ROWS = 128  # of float32 activations: XLA's product is faster than widening for a few at a time


def quantized_matmul_cpu(
    x_RI: jax.Array,
    w: QuantizedMatrix,
    *,
    activations: str = "float",
    layer: jax.Array | None = None,
) -> jax.Array:
    """`x @ w.T` on a CPU, from tiles.

    Works under `jit`, loops, `vmap` (whose rows become rows of one product) and `shard_map`. It has
    no gradient; `quantized_matmul(..., frozen=True)` has one.

    Args:
      x_RI: float32 or bfloat16 `[R, I]`; the sums are float32 in either case.
      w: `[O, I]` in tiles, with a scale per 16 columns or a multiple of that.
      activations: As for `quantized_matmul`.
      layer: int32; `w` is a stack `[L, O, I]`, and nothing of it is copied. A number that is none
        of a layer is an error when the program runs.

    Raises:
      NotImplementedError: What it cannot serve, or no library can be found or built; says why.
    """
    require("cpu")
    if not w.tiled:
        raise NotImplementedError("needs a matrix in tiles (QuantizedMatrix.to_tiles)")
    if w.group % FEWEST_COLUMNS:
        raise NotImplementedError(f"a scale per {w.group} columns; it takes multiples of 16")
    if activations == "int8" and w.table is not None:
        raise NotImplementedError("products of whole numbers take no table of values")
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in set(mesh.axis_names) - set(mesh.manual_axes)):
        raise NotImplementedError("does not divide itself over devices: call it in a shard_map")
    register()
    layer = None if layer is None else jnp.asarray(layer, jnp.int32)
    y_RO = _product(activations)(x_RI.astype(jnp.float32), w, layer)
    return y_RO.astype(x_RI.dtype)


@cache
def _product(activations: str):
    """Of float32 `[R, I]` with tiles; one function for each arithmetic, so that traces are kept."""

    @jax.custom_batching.custom_vmap
    def rows(x_RI, w, layer):
        if activations == "float" and x_RI.shape[0] >= MANY_ROWS:
            return quantized_matmul_xla(x_RI, w if layer is None else w.layer(layer))
        return _call(x_RI, w, layer, activations)

    @rows.def_vmap
    def several(axis_size, batched, *operands):
        x, w, layer = operands
        if not any(jax.tree.leaves(batched[1:])):
            y_RO = rows(x.reshape(-1, x.shape[-1]), w, layer)
            return y_RO.reshape(*x.shape[:-1], -1), True

        def one(i):
            pick = lambda leaf, is_batched: leaf[i] if is_batched else leaf  # noqa: E731
            return rows(*jax.tree.map(pick, operands, tuple(batched)))

        return jax.lax.map(one, jnp.arange(axis_size)), True

    @jax.custom_jvp
    def product(x_RI, w, layer):
        return rows(x_RI, w, layer)

    @product.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(
            "the product with tiles has no gradient: call quantized_matmul with frozen=True for "
            "that of the activations, or with implementation='xla'"
        )

    return product


def _call(
    x_RI: jax.Array, w: QuantizedMatrix, layer: jax.Array | None, activations: str
) -> jax.Array:
    O, nothing = w.shape[-2], jnp.zeros(0, jnp.float32)
    target = next(name for name in TARGETS if name.endswith(activations))
    y = jax.ShapeDtypeStruct((x_RI.shape[0], O), jnp.float32)
    if jax.sharding.get_abstract_mesh().manual_axes:  # a type that says where it differs
        some = jax.eval_shape(lambda scale: scale.ravel()[0].astype(jnp.float32), w.scale)
        y = jax.eval_shape(lambda x, one: x[:, :1] + jnp.zeros(O) * one, x_RI, some)
    optional = (nothing if part is None else part for part in (w.offset, w.table, layer))
    return jax.ffi.ffi_call(target, y)(x_RI, w.codes, w.scale, *optional)
