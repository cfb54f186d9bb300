"""The gradient of attention on TPU: masks, layouts and calls of `tpu_backward_kernels`."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.attention import tiles
from gemma_kernels.attention.mask import causal_rows, everything
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.attention.tpu import blocks as tpu_blocks
from gemma_kernels.attention.tpu.backward_kernels import (
    LANES,
    LOG2_E,
    BackwardBlocks,
    Plan,
    ring_kernel,
    row_kernel,
)

UNSEEING = 1e30  # log-sum-exp of a row without keys: all of its weights become 0


def attention_backward_tpu(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    dlse_BTN: jax.Array | None,
    lo_BT: jax.Array | None,
    hi_BT: jax.Array | None,
    kv_pos_BS: jax.Array | None,
    spec: AttentionSpec,
    *,
    blocks: BackwardBlocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dq_BTNH, dk_BSKH, dv_BSKH` in the dtypes of q, k and v.

    Args:
      out_BTNH, lse_BTN: What attention returned; the second in float32, -inf for rows without keys.
      dout_BTNH, dlse_BTN: Their cotangents; `None` for an unused log-sum-exp.
      lo_BT, hi_BT, kv_pos_BS: The mask; `None` where `spec` states it.
      blocks: Sizes of tiles; default: by chip and shape.
      interpret: Run without a TPU, by Pallas' interpreter.

    Raises:
      NotImplementedError: A call that these kernels do not serve; says why.
      ValueError: Sizes of tiles that do not fit.
    """
    if not spec.softmax_in_float32:
        raise NotImplementedError("its softmax is in float32 only")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries are {q_BTNH.dtype}; it takes bfloat16 and float32")
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if lo_BT is None:
        mask = causal_rows(B, T, S, spec.window) if spec.causal else everything(B, T, S)
        lo_BT, hi_BT, kv_pos_BS = mask
    blocks = blocks or default_blocks(q_BTNH.shape, k_BSKH.shape, spec, q_BTNH.dtype)
    if spec.window is not None and blocks.q % blocks.k:
        raise ValueError(f"with a window, q={blocks.q} must be a multiple of k={blocks.k}")

    width, count = pl.cdiv(H, LANES) * LANES, pl.cdiv(T, blocks.q)
    shape = (B, count * blocks.q, K, N // K)
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    if dlse_BTN is not None:
        delta_BTN -= dlse_BTN
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, UNSEEING, lse_BTN * LOG2_E)
    # Up to whole tiles: queries that see nothing. Heads first: the layout of the operands is the
    # compiler's to choose, so this is no copy by itself.
    lo_BT, hi_BT = (_pad(x, 1, shape[1]) for x in (lo_BT, hi_BT))
    delta_BKGT, lse_BKGT = (
        jnp.moveaxis(_pad(x, 1, shape[1], fill).reshape(shape), 1, 3)
        for x, fill in ((delta_BTN, 0.0), (lse_BTN, UNSEEING))
    )
    q_BKGTH, dout_BKGTH = (
        jnp.moveaxis(_pad(_pad(x, 3, width), 1, shape[1]).reshape(*shape, width), 1, 3)
        for x in (q_BTNH, dout_BTNH.astype(q_BTNH.dtype))
    )
    plan = Plan(blocks, spec, N // K, width, q_BTNH.dtype, 0, 0, count, 0)
    scaled_BSKH = (k_BSKH.astype(jnp.float32) * plan.factor).astype(plan.dtype)
    k_BKSH, v_BKSH = (
        jnp.moveaxis(_pad(x.astype(plan.dtype), 3, width), 1, 2) for x in (scaled_BSKH, v_BSKH)
    )
    queries = (lo_BT, hi_BT, lse_BKGT, delta_BKGT, q_BKGTH, dout_BKGTH)
    kernel = _with_window if _ring_fits(plan, S) else _without_window
    dq_BKGTH, dk_BKSH, dv_BKSH = kernel(queries, k_BKSH, v_BKSH, kv_pos_BS, T, plan, interpret)

    dq_BTNH = jnp.moveaxis(dq_BKGTH, 3, 1).reshape(*shape[:2], N, width)[:, :T, :, :H]
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x, 2, 1)[..., :H] for x in (dk_BKSH, dv_BKSH))
    return (
        dq_BTNH.astype(q_BTNH.dtype),
        dk_BSKH.astype(k_BSKH.dtype),
        dv_BSKH.astype(v_BSKH.dtype),
    )


def default_blocks(q_shape: tuple, k_shape: tuple, spec: AttentionSpec, dtype) -> BackwardBlocks:
    """The table's tiles for the chip that the program is for, and no larger than the call.

    Half as many queries in float32, whose products take six passes, and six times the code.
    """
    T, N, H = q_shape[1:]
    S, K = k_shape[1:3]
    row = tpu_blocks.nearest("backward", tpu_blocks.this_chip(), N // K, H, spec.window)
    best = BackwardBlocks(**row["blocks"])
    q = min(best.q if dtype == jnp.bfloat16 else best.q // 2, pl.cdiv(T, LANES) * LANES)
    keys = q if spec.window is not None else pl.cdiv(S, LANES) * LANES
    part = math.gcd(best.part, q) if best.part else None
    return BackwardBlocks(q, math.gcd(best.piece, q), math.gcd(best.k, keys), part=part)


def _vmem_limit() -> int:
    """Bytes that a kernel may use; the rest is the compiler's."""
    return tpu_blocks.vmem_bytes() * 7 // 8


def _slots(plan: Plan, S: int) -> int:
    """Blocks of keys that a tile sees under a window: its own and those before."""
    return pl.cdiv(min(plan.spec.window, S) - 1, plan.blocks.q) + 1


def _ring_fits(plan: Plan, S: int) -> bool:
    """Whether a window is promised, and is narrow enough for a ring in half of VMEM."""
    if plan.spec.window is None:
        return False
    key_bytes = 2 * plan.width * (plan.dtype.itemsize + 4)  # k and v, dk and dv
    return _slots(plan, S) * plan.blocks.q * key_bytes <= _vmem_limit() // 2


def _with_window(queries, k_BKSH, v_BKSH, kv_pos_BS, T: int, plan: Plan, interpret):
    """Gradients in whole tiles for dq; dk and dv of the keys as they came."""
    B, K, S, H = k_BKSH.shape
    size, slots = plan.blocks.q, _slots(plan, S)
    before = slots - 1
    # The promised window hides all keys before `start`. The others are moved to where the first
    # query's key begins a block.
    start = max(0, S - T - before * size)
    offset = S - T - start
    front = max(-offset, -offset % size)
    own = (offset + front) // size
    plan = replace(
        plan,
        slots=slots,
        own=own,
        key_blocks=own + plan.tiles,
        spec=replace(plan.spec, window=min(plan.spec.window, S)),
    )
    length = plan.key_blocks * size
    k_BKSH, v_BKSH = (_pad(x[:, :, start:], 2, length, 0, front) for x in (k_BKSH, v_BKSH))
    kv_pos_BS = _pad(kv_pos_BS[:, start:], 1, length, -1, front)
    lo_BT, hi_BT = queries[:2]
    first, last, *_ = _bounds(lo_BT, hi_BT, kv_pos_BS, plan.part, plan.blocks.k)
    plain = tiles.plain_windows(lo_BT, hi_BT, kv_pos_BS, size, own * size, plan.spec.window)
    scalars = (first, last, plain.reshape(-1))

    def tile(step):
        return jnp.clip(step - plan.own, 0, plan.tiles - 1)

    def entering(b, h, step, *_):
        return b, h, jnp.minimum(step, plan.key_blocks - 1), 0

    def leaving(b, h, step, *_):
        return b, h, jnp.clip(step - before, 0, plan.key_blocks - 1), 0

    block = (None, None, size, H)
    dq_BKGTH, dk_BKSH, dv_BKSH = _call(
        ring_kernel,
        plan,
        scalars,
        (*queries, kv_pos_BS, k_BKSH, v_BKSH),
        tile,
        grid=(B, K, plan.key_blocks + before),
        keys_in=pl.BlockSpec(block, entering),
        keys_out=pl.BlockSpec(block, leaving),
        dtype=plan.dtype,
        scratch=[
            pltpu.VMEM((plan.slots, size, H), dtype)
            for dtype in (plan.dtype, plan.dtype, jnp.float32, jnp.float32)
        ],
        interpret=interpret,
        name="local_attention_backward",
    )
    widths = ((0, 0), (0, 0), (start, 0), (0, 0))
    dk_BKSH, dv_BKSH = (
        jnp.pad(x[:, :, front : front + S - start], widths) for x in (dk_BKSH, dv_BKSH)
    )
    return dq_BKGTH, dk_BKSH, dv_BKSH


def _without_window(queries, k_BKSH, v_BKSH, kv_pos_BS, T: int, plan: Plan, interpret):
    """Gradients in whole tiles for dq; dk and dv of the keys as they came."""
    B, K, S, H = k_BKSH.shape
    size = plan.blocks.k
    row = plan.blocks.row
    if row is None:  # half of VMEM: k, v, dk and dv, twice each for the pipeline
        fitting = _vmem_limit() // 2 // (4 * H * (plan.dtype.itemsize + 4))
        row = max(1, fitting // size) * size
    row = min(row, pl.cdiv(S, size) * size)
    parts = pl.cdiv(S, row)
    plan = replace(plan, key_blocks=row // size)

    def split(x, axis, fill=0):
        """`[parts, ...]`, each with whole blocks of keys."""
        x = _pad(x, axis, parts * row, fill)
        x = x.reshape(*x.shape[:axis], parts, row, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def stay(b, h, tile, *_):
        return b, h, 0, 0, 0

    def part(k_BKSH, v_BKSH, kv_pos_BS):
        in_blocks = (B, K, plan.key_blocks, size, H)
        keys = pl.BlockSpec((None, None, *in_blocks[2:]), stay)
        return _call(
            row_kernel,
            plan,
            _bounds(*queries[:2], kv_pos_BS, plan.blocks.q, size),
            (*queries, kv_pos_BS, k_BKSH.reshape(in_blocks), v_BKSH.reshape(in_blocks)),
            lambda tile: tile,
            grid=(B, K, plan.tiles),
            keys_in=keys,
            keys_out=keys,
            dtype=jnp.float32,
            scratch=[],
            interpret=interpret,
            name="global_attention_backward",
        )

    keys = (split(k_BKSH, 2), split(v_BKSH, 2), split(kv_pos_BS, 1, -1))
    if parts == 1:
        dq_BKGTH, *dkv = part(*(x[0] for x in keys))
        dkv = [x[None] for x in dkv]
    else:

        def add(dq_BKGTH, keys):
            more_BKGTH, *dkv = part(*keys)
            return dq_BKGTH + more_BKGTH, dkv

        dq_BKGTH, dkv = lax.scan(add, jnp.zeros(queries[-1].shape, jnp.float32), keys)
    dk_BKSH, dv_BKSH = (
        jnp.moveaxis(x.reshape(parts, B, K, row, H), 0, 2).reshape(B, K, -1, H)[:, :, :S]
        for x in dkv
    )
    return dq_BKGTH, dk_BKSH * plan.spec.scale, dv_BKSH


def _call(
    kernel,
    plan: Plan,
    scalars: tuple,
    operands: tuple,
    tile: Callable,
    *,
    grid: tuple,
    keys_in: pl.BlockSpec,
    keys_out: pl.BlockSpec,
    dtype: jnp.dtype,
    scratch: list,
    interpret,
    name: str,
):
    """One pass of `kernel` over the grid; `tile` is the tile of queries of a step."""
    *queries, kv_pos_BS, k, v = operands
    lo_BT, hi_BT, *rows, q_BKGTH, dout_BKGTH = queries
    groups, H, size = plan.groups, plan.width, plan.blocks.q
    t_spec = pl.BlockSpec((None, 1, size), lambda b, h, step, *_: (b, 0, tile(step)))
    s_spec = pl.BlockSpec((None, 1, kv_pos_BS.shape[1]), lambda b, h, step, *_: (b, 0, 0))
    row_spec = pl.BlockSpec(
        (None, None, groups, size), lambda b, h, step, *_: (b, h, 0, tile(step))
    )
    q_spec = pl.BlockSpec(
        (None, None, groups, size, H), lambda b, h, step, *_: (b, h, 0, tile(step), 0)
    )
    dq_sum = pltpu.VMEM((len(plan.starts), H, groups * plan.blocks.piece), jnp.float32)
    return pl.pallas_call(
        partial(kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[t_spec, t_spec, row_spec, row_spec, q_spec, q_spec, s_spec, keys_in, keys_in],
            out_specs=[q_spec, keys_out, keys_out],
            scratch_shapes=[dq_sum, *scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x in (q_BKGTH, k, v)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(),
        ),
        interpret=interpret,
        name=name,
    )(
        *scalars,
        lo_BT[:, None],
        hi_BT[:, None],
        *rows,
        q_BKGTH,
        dout_BKGTH,
        kv_pos_BS[:, None],
        k,
        v,
    )


def _bounds(lo_BT, hi_BT, kv_pos_BS, q: int, k: int) -> list[jax.Array]:
    """`tiles.bounds`, flat. Weights of queries that see nothing are 0 anyway (`UNSEEING`)."""
    blocks = tiles.visible_blocks(lo_BT, hi_BT, kv_pos_BS, q, k, unseeing=False)
    return [x.reshape(-1) for x in tiles.bounds(*blocks)]


def _pad(x: jax.Array, axis: int, size: int, value: float = 0, front: int = 0) -> jax.Array:
    """`x` with `front` values before and as many behind as make `size` along `axis`."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (front, size - front - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)
