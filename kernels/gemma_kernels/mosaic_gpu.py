"""Mosaic GPU as the supported versions of JAX have it, and what its interpreter leaves out.

The interpreter runs barriers and copies of all warpgroups, and looks for races among them. It
knows neither layouts nor accumulators that outlive a product (`pl.run_state`), so in it products
are `jnp.dot` of the same tiles.
"""

import math
from collections.abc import Callable
from inspect import Parameter, signature

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows (columns) of a matrix spread over the threads of a warpgroup as wgmma leaves its result.
MATRIX = plgpu.Layout.WGMMA
PACKED = plgpu.Layout.WGMMA_UPCAST_2X  # the same for bytes, with four neighbours in a register
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
LOG2_E = math.log2(math.e)
LOWEST = -1e29  # of a row's maximum; finite, so that a row that sees nothing gets weights 0
SMEM_LIMIT = 227 * 1024  # bytes of one block on Hopper
# On jax 0.10.2, where later versions have none.
_LOAD_TAKES_AN_INDEX = (
    signature(plgpu.load).parameters.get("idx", Parameter).default is Parameter.empty
)
PIECE = 64  # rows of a wgmma, and 16-bit columns of its 128-byte swizzle


def interpreter():
    """What `interpret=` of a kernel takes; jax 0.10.2 has no public name for it."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def compiler_params() -> plgpu.CompilerParams:
    """Reductions within a warp need no shared memory, so none is set aside."""
    return plgpu.CompilerParams(
        approx_math=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    )


def joins_batch(function: Callable) -> Callable:
    """`function` of arrays (or `None`) whose first axis is the batch, and so are its results'.

    `vmap`, which kernels do not know, makes the new axis a part of the batch.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, in_batched, *args):
        def fold(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        results = mapped(*jax.tree.map(fold, args, tuple(in_batched)))
        unfolded = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return unfolded, jax.tree.map(lambda _: True, unfolded)

    return mapped


def matrix_smem(shape: tuple[int, ...], dtype, interpret: bool, columns: int = PIECE):
    """Shared memory for matrices: in pieces of 8 rows by `columns`, which are up to 128 bytes,
    swizzled so that banks do not clash. The default is how wgmma takes its 16-bit operands."""
    if interpret:
        return plgpu.SMEM(shape, dtype)
    row = columns * jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(row))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Ops:
    """What kernels compute on registers, compiled or interpreted."""

    def __init__(self, interpret: bool):
        self.interpret = interpret

    def laid(self, x: jax.Array, layout) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def load(self, ref, layout) -> jax.Array:
        """A vector from global memory."""
        if self.interpret:
            return ref[...]
        index = ((),) if _LOAD_TAKES_AN_INDEX else ()
        return plgpu.load(ref, *index, layout=layout, optimized=False)

    def full(self, shape: tuple[int, ...], value, layout) -> jax.Array:
        return self.laid(jnp.full(shape, value, jnp.float32), layout)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)

    def scores(self, a_ref, b_ref, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
        """`a @ b.T` in float32; `meanwhile` runs while the product is under way."""
        if self.interpret:
            meanwhile()
            return _dot(a_ref[...], b_ref[...].T)

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a_ref, b_ref.T)
            meanwhile()
            return acc_ref[...]

        shape = (a_ref.shape[0], b_ref.shape[0])
        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

    def product_with_rows(self, a: jax.Array, b_ref) -> jax.Array:
        """`a @ b.T` in float32; `a` in registers."""
        if self.interpret:
            return _dot(a, b_ref[...].T)

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a, b_ref.T)
            return acc_ref[...]

        return pl.run_scoped(product, plgpu.ACC((a.shape[0], b_ref.shape[0]), jnp.float32))

    def add_product(
        self, acc: jax.Array, a, b_ref, meanwhile: Callable[[], None] = lambda: None
    ) -> jax.Array:
        """`acc + a @ b`; `a` in registers (or shared memory), rounded to the dtype of `b`."""
        if self.interpret:
            meanwhile()
            return acc + _dot(a[...], b_ref[...])

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a, b_ref)
            meanwhile()

        return pl.run_state(product)(plgpu.ACC.init(acc))


def down(x: jax.Array, like: jax.Array) -> jax.Array:
    """A value per row, repeated along the columns of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def across(x: jax.Array, like: jax.Array) -> jax.Array:
    """A value per column, repeated along the rows of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def tanh(x: jax.Array) -> jax.Array:
    """To 1e-7. The hardware's own is off by 5e-4, which a soft cap of 50 makes an error of 0.02."""
    return 1 - 2 * lax.square(lax.rsqrt(jnp.exp2(x * (2 * LOG2_E)) + 1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    exact = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), **exact)
