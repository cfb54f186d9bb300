"""Attention on Hopper, gradients: two Mosaic GPU kernels that spill no register.

With P = softmax(scale Q K^T), the gradients are five matrix products:

    S = Q K^T    dP = dO V^T    dS = P * (dP - delta)    dV = P^T dO    dK = dS^T Q    dQ = dS K

where delta = rowsum(dO * O), less the gradient of the log-sum-exp. Sums over queries (dK, dV) and
over keys (dQ) do not fit into the registers together. Adding up one of them in memory would either
depend on the order in which blocks finish, and differ from run to run, or make blocks wait for one
another. So there are two kernels, and both compute S and dP: 7 products instead of 5.

dK, dV: two sums of 64 x 256 floats take all registers of a warpgroup, so kernels that give each
warpgroup some rows of both spill. Here warpgroups differ by role. A block of 384 threads takes a
block of keys, and all tiles of queries, of all heads of the group, that meet it:

    warpgroup 0    S^T = K Q^T,    P^T  -> shared memory -> warpgroup 1,    dV += P^T dO
    warpgroup 1    dP^T = V dO^T,  dS^T = P^T * (dP^T - delta),             dK += dS^T Q
    warpgroup 2    one thread of it asks the TMA unit for Q and dO, some tiles ahead

Each has the tensor cores for half of the time and does its arithmetic in the other half.

dQ: a block takes 64 queries of one head per warpgroup, and all blocks of keys that meet them:

    warpgroup 0, 1    S = Q K^T,  dP = dO V^T,  dQ += dS K
    warpgroup 2       asks for K and V

What they hold at once, of 240 registers and 227 KB of shared memory:

    head      dK, dV: sum + scores            dQ: sum + scores
      64     64 + 64 registers,  99 KB     32 + 2 * 64 registers,  97 KB
     128    128 + 64 registers, 163 KB     64 + 2 * 64 registers, 193 KB
     256    128 + 32 registers, 211 KB    128 + 2 * 32 registers, 225 KB

What is to be expected at width 256: cycles of one of the 132 processors for 64 keys x 64 queries,
if tensor cores (2048 multiply-adds per cycle), shared memory (128 bytes per cycle) and the L2 cache
(some 26 bytes per cycle, 64 KB for a tile of Q and dO) were each busy all the time:

              products    tensor cores    shared memory     L2
    dK, dV        4           2048             2200        2500
    dQ            3           1536             1540        1250

So at best 2500 + 1540 cycles for the five products that count, which alone are 2560: 63 % of the
peak, 620 of 989 TFLOP/s; two thirds of that, as good kernels reach, are 400. Nothing is measured.

Only blocks at an edge of the mask use intervals and positions, so a mask known at compile time is
written out as those, and costs no more. Lengths that are no multiple of a tile cost a padded copy.

Local letters: I tiles of queries; J blocks of keys.
"""

from collections.abc import Callable
from functools import partial
from math import lcm

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma_kernels.attention.hopper.backward_kernels import (
    HANDED,
    SLOTS,
    BackwardBlocks,
    Plan,
    dkv_kernel,
    dq_kernel,
)
from gemma_kernels.attention.hopper.tiles import classify, pad_axis, runs
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.mosaic_gpu import (
    LOG2_E,
    PIECE,
    SMEM_LIMIT,
    compiler_params,
    matrix_smem,
)

WIDEST = 256


def default_blocks(width: int, soft_cap: float | None) -> BackwardBlocks:
    """By width of heads, a multiple of 64; a soft cap needs registers for its derivative."""
    if width > 128:
        return BackwardBlocks(dq_stages_v=1, dq_turns=False)
    return BackwardBlocks() if soft_cap else BackwardBlocks(dkv_k=128, dq_k=128)


def attention_backward_hopper(
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
    interpret: object | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the loss by queries, keys and values, in the dtype of the queries.

    Args:
      q_BTNH, k_BSKH, v_BSKH: As of the forward pass; bfloat16 or float16, of one dtype.
      out_BTNH, lse_BTN: Its results. A row that sees nothing has a `lse` of -inf.
      dout_BTNH, dlse_BTN: Gradients of the loss by those; `None` for zeros.
      lo_BT, hi_BT, kv_pos_BS: The mask; may be `None` if `spec` says all of it.
      blocks: Sizes of tiles; default: by head width.
      interpret: `mosaic_gpu.interpreter()` runs the kernels on a CPU.

    Raises:
      NotImplementedError: A call that these kernels do not serve; says why.
      ValueError: Sizes of tiles that do not fit.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    width = pl.cdiv(H, PIECE) * PIECE
    blocks = blocks or default_blocks(width, spec.soft_cap)
    _check(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, blocks, width)
    plan = Plan(blocks, N // K, width, spec, q_BTNH.dtype, interpret)

    if spec.causal or not spec.masked:
        lo_BT, hi_BT, kv_pos_BS = _stated_mask(B, T, S, spec)
    lo_BT, hi_BT = (pad_axis(x, 1, blocks.dq_q) for x in (jnp.maximum(lo_BT, 0), hi_BT))
    unit_k = lcm(blocks.dkv_k, blocks.dq_k)
    kv_pos_BS = pad_axis(kv_pos_BS, 1, unit_k, -1)
    mask = (lo_BT, hi_BT, kv_pos_BS)

    rows_BN2T = pad_axis(_rows(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN), 3, blocks.dq_q)
    q_BTNH, dout_BTNH = (
        pad_axis(pad_axis(x, 3, PIECE), 1, blocks.dq_q) for x in (q_BTNH, dout_BTNH)
    )
    k_BSKH, v_BSKH = (pad_axis(pad_axis(x, 3, PIECE), 1, unit_k) for x in (k_BSKH, v_BSKH))
    operands = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T)
    dk_BSKH, dv_BSKH = _dkv(*operands, mask, plan)
    dq_BTNH = _dq(*operands, mask, plan)
    return dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKH[:, :S, :, :H]


def _check(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, blocks: BackwardBlocks, width: int) -> None:
    dtypes = {x.dtype for x in (q_BTNH, k_BSKH, v_BSKH, dout_BTNH)}
    if len(dtypes) > 1 or q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"operands are {', '.join(sorted(map(str, dtypes)))}; Hopper's tensor cores take "
            "bfloat16 or float16 in full (all of one), and would round float32 to 10 bits"
        )
    if q_BTNH.shape[3] > WIDEST:
        raise NotImplementedError(
            f"heads are {q_BTNH.shape[3]} wide; registers hold sums of {WIDEST} columns"
        )
    if blocks.dkv_q not in (64, 128) or blocks.dkv_k % 64 or blocks.dq_k % 16:
        raise ValueError(f"{blocks} needs dkv_q 64 or 128, dkv_k a multiple of 64, dq_k of 16")
    if blocks.smem(width) > SMEM_LIMIT - 3072:
        raise ValueError(
            f"{blocks} takes {blocks.smem(width)} bytes of shared memory at head width {width}; "
            f"{SMEM_LIMIT - 3072} are there: choose fewer stages or smaller blocks"
        )


def _stated_mask(B: int, T: int, S: int, spec: AttentionSpec) -> tuple[jax.Array, ...]:
    """Intervals of a mask known from `spec`: only tiles at an edge read them."""
    row_T = jnp.arange(T, dtype=jnp.int32) + (S - T)
    row_S = jnp.arange(S, dtype=jnp.int32)
    lo_T, hi_T = jnp.zeros_like(row_T), row_T + 1
    if not spec.masked:
        hi_T = jnp.full_like(row_T, S)
    elif spec.window is not None:
        lo_T = hi_T - spec.window
    return tuple(jnp.broadcast_to(x, (B, len(x))) for x in (lo_T, hi_T, row_S))


def _rows(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> jax.Array:
    """Two numbers per query and head: log-sum-exp, for base 2, and delta; float32 `[B, N, 2, T]`.

    Of a query that sees nothing the former is inf, which makes all its probabilities 0.
    """
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=3)
    if dlse_BTN is not None:
        delta_BTN -= dlse_BTN
    sees_BTN = lse_BTN > -jnp.inf
    lse_BTN = jnp.where(sees_BTN, lse_BTN * LOG2_E, jnp.inf)
    delta_BTN = jnp.where(sees_BTN, delta_BTN, 0.0)
    return jnp.stack([lse_BTN, delta_BTN], axis=1).transpose(0, 3, 1, 2)


def _dkv(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, mask, plan: Plan):
    B, S, K, H = k_BSKH.shape
    q, k, stages = plan.blocks.dkv_q, plan.blocks.dkv_k, plan.blocks.dkv_stages
    lo_BT, hi_BT, kv_pos_BS = mask
    flags_BJI = (x.swapaxes(1, 2) for x in classify(lo_BT, hi_BT, kv_pos_BS, q, k))
    runs_4BJ = jnp.stack(runs(*flags_BJI))
    scratch = dict(
        k=_matrix(plan, 1, k, H),
        v=_matrix(plan, 1, k, H),
        q=_matrix(plan, stages, q, H),
        dout=_matrix(plan, stages, q, H),
        p=matrix_smem((SLOTS, k, q), HANDED, plan.interpret is not None),
        rows=plgpu.SMEM((2, stages, q), jnp.float32),
        interval=plgpu.SMEM((stages, 2, q), jnp.int32),
        pos=plgpu.SMEM((k,), jnp.int32),
        k_full=plgpu.Barrier(num_arrivals=2),
        v_full=plgpu.Barrier(),
        q_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        dout_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        dout_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        p_full=plgpu.Barrier(num_barriers=SLOTS),
        p_free=plgpu.Barrier(num_barriers=SLOTS),
    )
    out = jax.ShapeDtypeStruct(k_BSKH.shape, plan.dtype)
    kernel = _kernel(dkv_kernel, (B, K, S // k), (out, out), scratch, plan)
    interval_B2T = jnp.stack([lo_BT, hi_BT], axis=1)
    return kernel(runs_4BJ, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, interval_B2T, kv_pos_BS)


def _dq(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, mask, plan: Plan):
    B, T, N, H = q_BTNH.shape
    q, k = plan.blocks.dq_q, plan.blocks.dq_k
    stages_k, stages_v = plan.blocks.dq_stages_k, plan.blocks.dq_stages_v
    runs_4BI = jnp.stack(runs(*classify(*mask, q, k)))
    scratch = dict(
        q=_matrix(plan, 2, PIECE, H),
        dout=_matrix(plan, 2, PIECE, H),
        k=_matrix(plan, stages_k, k, H),
        v=_matrix(plan, stages_v, k, H),
        pos=plgpu.SMEM((stages_k, k), jnp.int32),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        k_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages_k),
        v_full=plgpu.Barrier(num_barriers=stages_v),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages_k),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages_v),
        turn=plgpu.Barrier(num_arrivals=2),
    )
    out = jax.ShapeDtypeStruct(q_BTNH.shape, plan.dtype)
    kernel = _kernel(dq_kernel, (B, N, T // q), out, scratch, plan)
    return kernel(runs_4BI, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, *mask)


def _kernel(body: Callable, grid: tuple[int, int, int], out_type, scratch: dict, plan: Plan):
    return plgpu.kernel(
        partial(body, plan=plan),
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "head", "block"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=plan.interpret,
        kernel_name=f"attention_hopper_{body.__name__.removesuffix('_kernel')}",
    )


def _matrix(plan: Plan, *shape: int):
    return matrix_smem(shape, plan.dtype, plan.interpret is not None)
