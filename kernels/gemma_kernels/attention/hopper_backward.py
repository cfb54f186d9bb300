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
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import lcm
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma_kernels.attention.hopper_tiles import Runs, classify, pad_axis, runs
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.mosaic_gpu import (
    LOG2_E,
    PIECE,
    ROWS,
    SMEM_LIMIT,
    Ops,
    across,
    compiler_params,
    down,
    matrix_smem,
    scores_in_log2,
)

WIDEST = 256
SLOTS = 2  # tiles of probabilities on their way from one warpgroup to the other,
HANDED = jnp.float16  # as 16 bits, of which it keeps three more than bfloat16: none exceeds 1
# Of the 168 per thread with which three warpgroups start: 2 * 240 + 24 = 3 * 168. Asking for more
# would wait for ever.
REGISTERS_COMPUTE, REGISTERS_LOAD = 240, 24


@dataclass(frozen=True)
class BackwardBlocks:
    """Sizes of tiles.

    Attributes:
      dkv_q, dkv_k: Queries of a tile and keys of a block, for dK and dV; multiples of 64.
      dkv_stages: Tiles of queries in shared memory.
      dq_k: Keys of a block for dQ; a multiple of 16. It has 64 queries per warpgroup.
      dq_stages_k, dq_stages_v: Blocks of keys and of values in shared memory.
      dq_turns: Whether the two warpgroups of dQ use the tensor cores in turns. With one block of
        values in shared memory they would wait for the next one, which both must have left.
    """

    dkv_q: int = 64
    dkv_k: int = 64
    dkv_stages: int = 2
    dq_k: int = 64
    dq_stages_k: int = 2
    dq_stages_v: int = 2
    dq_turns: bool = True

    @property
    def dq_q(self) -> int:
        return 2 * PIECE

    def smem(self, width: int) -> int:
        """Bytes of shared memory for matrices; numbers per query and barriers take up to 3 KB."""
        dkv = width * 2 * (self.dkv_k + self.dkv_stages * self.dkv_q)
        dkv += SLOTS * self.dkv_k * self.dkv_q
        dq = width * (2 * self.dq_q + (self.dq_stages_k + self.dq_stages_v) * self.dq_k)
        return 2 * max(dkv, dq)


@dataclass(frozen=True)
class _Plan:
    """What the kernels know at compile time. `interpret`: parameters of the interpreter."""

    blocks: BackwardBlocks
    groups: int
    width: int
    spec: AttentionSpec
    dtype: jnp.dtype
    interpret: object | None


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
    plan = _Plan(blocks, N // K, width, spec, q_BTNH.dtype, interpret)

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


def _dkv(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, mask, plan: _Plan):
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
    kernel = _kernel(_dkv_kernel, (B, K, S // k), (out, out), scratch, plan)
    interval_B2T = jnp.stack([lo_BT, hi_BT], axis=1)
    return kernel(runs_4BJ, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, interval_B2T, kv_pos_BS)


def _dkv_kernel(
    runs_gmem, q_gmem, k_gmem, v_gmem, dout_gmem, rows_gmem, interval_gmem, pos_gmem,
    dk_gmem, dv_gmem, *, plan: _Plan, **scratch,
):  # fmt: skip
    """One block of keys of one head; neighbours share the queries, and so the L2 cache."""
    smem = SimpleNamespace(**scratch)
    batch, head, block, warpgroup = _coordinates()
    q, k, stages = plan.blocks.dkv_q, plan.blocks.dkv_k, plan.blocks.dkv_stages
    met = Runs(*(runs_gmem[i, batch, block] for i in range(4)))
    keys = pl.ds(block * k, k)
    steps = (met.end - met.first) * plan.groups  # every tile of queries for all heads of the group

    def tile_of(n):
        return met.first + lax.div(n, plan.groups)

    @pl.when(warpgroup == 0)
    def _values():
        plgpu.set_max_registers(REGISTERS_COMPUTE, action="increase")
        _each(plgpu.barrier_arrive, smem.q_free, smem.dout_free)

        def step(n, dv):
            stage, slot, tile = lax.rem(n, stages), lax.rem(n, SLOTS), tile_of(n)
            plgpu.barrier_wait(smem.q_full.at[stage])
            s = _product(plan, smem.k.at[_zero(tile)], smem.q.at[stage])
            interval = (smem.interval.at[stage, 0], smem.interval.at[stage, 1])
            mask = partial(_hide, _whole(tile, met), smem.pos, *interval, across, down)
            lse = across(smem.rows[0, stage], s)
            p, dp_factor = _probabilities(s, lse, mask, plan.spec)
            _release(smem.q_free.at[stage])
            plgpu.barrier_wait(smem.p_free.at[slot])
            smem.p[slot] = dp_factor.astype(HANDED)
            plgpu.barrier_arrive(smem.p_full.at[slot])
            plgpu.barrier_wait(smem.dout_full.at[stage])
            dv = _add_product(plan, dv, p.astype(plan.dtype), smem.dout.at[stage])
            _release(smem.dout_free.at[stage])
            return dv

        plgpu.barrier_wait(smem.k_full)
        finish = partial(_write, plan, 1.0, smem.k.at[0], dv_gmem.at[batch, keys, head])
        _sum(plan, steps, step, (k, plan.width), finish)
        _each(plgpu.barrier_wait, smem.p_free)

    @pl.when(warpgroup == 1)
    def _keys():
        plgpu.set_max_registers(REGISTERS_COMPUTE, action="increase")
        _each(plgpu.barrier_arrive, smem.q_free, smem.dout_free, smem.p_free)

        def step(n, dk):
            stage, slot = lax.rem(n, stages), lax.rem(n, SLOTS)
            plgpu.barrier_wait(smem.dout_full.at[stage])
            dp = _product(plan, smem.v.at[_zero(tile_of(n))], smem.dout.at[stage])
            dp -= across(smem.rows[1, stage], dp)
            _release(smem.dout_free.at[stage])
            plgpu.barrier_wait(smem.p_full.at[slot])
            ds = smem.p[slot].astype(jnp.float32) * dp
            plgpu.barrier_arrive(smem.p_free.at[slot])
            plgpu.barrier_wait(smem.q_full.at[stage])
            dk = _add_product(plan, dk, ds.astype(plan.dtype), smem.q.at[stage])
            _release(smem.q_free.at[stage])
            return dk

        plgpu.barrier_wait(smem.v_full)
        finish = partial(_write, plan, plan.spec.scale, smem.v.at[0], dk_gmem.at[batch, keys, head])
        _sum(plan, steps, step, (k, plan.width), finish)

    @pl.when(warpgroup == 2)
    def _loads():
        plgpu.set_max_registers(REGISTERS_LOAD, action="decrease")
        plgpu.copy_gmem_to_smem(k_gmem.at[batch, keys, head], smem.k.at[0], smem.k_full)
        plgpu.copy_gmem_to_smem(pos_gmem.at[batch, keys], smem.pos, smem.k_full)
        plgpu.copy_gmem_to_smem(v_gmem.at[batch, keys, head], smem.v.at[0], smem.v_full)

        @pl.loop(0, steps)
        def _(n):
            stage, q_head = lax.rem(n, stages), head * plan.groups + lax.rem(n, plan.groups)
            queries = pl.ds(tile_of(n) * q, q)
            rows = rows_gmem.at[batch, q_head]

            def load(gmem, to, full):
                plgpu.copy_gmem_to_smem(gmem, to, full.at[stage])

            plgpu.barrier_wait(smem.q_free.at[stage])
            load(q_gmem.at[batch, queries, q_head], smem.q.at[stage], smem.q_full)
            load(rows.at[0, queries], smem.rows.at[0, stage], smem.q_full)
            load(interval_gmem.at[batch, :, queries], smem.interval.at[stage], smem.q_full)
            plgpu.barrier_wait(smem.dout_free.at[stage])
            load(dout_gmem.at[batch, queries, q_head], smem.dout.at[stage], smem.dout_full)
            load(rows.at[1, queries], smem.rows.at[1, stage], smem.dout_full)

        _each(plgpu.barrier_wait, smem.q_free, smem.dout_free)


def _dq(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, mask, plan: _Plan):
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
    kernel = _kernel(_dq_kernel, (B, N, T // q), out, scratch, plan)
    return kernel(runs_4BI, q_BTNH, k_BSKH, v_BSKH, dout_BTNH, rows_BN2T, *mask)


def _dq_kernel(
    runs_gmem, q_gmem, k_gmem, v_gmem, dout_gmem, rows_gmem, lo_gmem, hi_gmem, pos_gmem,
    dq_gmem, *, plan: _Plan, **scratch,
):  # fmt: skip
    """One tile of queries of one head; the last first, which see most under a causal mask."""
    smem, ops = SimpleNamespace(**scratch), Ops(plan.interpret is not None)
    batch, head, block, warpgroup = _coordinates()
    tile = q_gmem.shape[1] // plan.blocks.dq_q - 1 - block
    k, stages_k, stages_v = plan.blocks.dq_k, plan.blocks.dq_stages_k, plan.blocks.dq_stages_v
    met = Runs(*(runs_gmem[i, batch, tile] for i in range(4)))
    steps = met.end - met.first

    @pl.when(warpgroup < 2)
    def _queries():
        plgpu.set_max_registers(REGISTERS_COMPUTE, action="increase")
        _each(plgpu.barrier_arrive, smem.k_free, smem.v_free)
        queries = pl.ds(tile * plan.blocks.dq_q + warpgroup * PIECE, PIECE)
        full = smem.q_full.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_gmem.at[batch, queries, head], smem.q.at[warpgroup], full)
        plgpu.copy_gmem_to_smem(dout_gmem.at[batch, queries, head], smem.dout.at[warpgroup], full)
        lse, delta = (ops.load(rows_gmem.at[batch, head, i, queries], ROWS) for i in range(2))
        interval = [ops.load(x.at[batch, queries], ROWS) for x in (lo_gmem, hi_gmem)]
        plgpu.barrier_wait(full)

        def take_turn():
            """One of the two has the tensor cores, while the other does its arithmetic."""
            if plan.blocks.dq_turns:
                plgpu.barrier_arrive(smem.turn)
                plgpu.barrier_wait(smem.turn)

        def step(n, dq):
            stage_k, stage_v = lax.rem(n, stages_k), lax.rem(n, stages_v)
            block_k = met.first + n
            mine, v_at = warpgroup + _zero(block_k), stage_v + _zero(block_k)

            def scores(s, dp):
                plgpu.barrier_wait(smem.k_full.at[stage_k])
                s = _multiply(plan, s, smem.q.at[mine], smem.k.at[stage_k])
                plgpu.barrier_wait(smem.v_full.at[stage_v])
                dp = _multiply(plan, dp, smem.dout.at[mine], smem.v.at[v_at])
                take_turn()
                s = _value(plan, s, in_flight=1)
                pos = smem.pos.at[stage_k]
                mask = partial(_hide, _whole(block_k, met), pos, *interval, down, across)
                _, dp_factor = _probabilities(s, down(lse, s), mask, plan.spec)
                return dp_factor * (_value(plan, dp) - down(delta, s))

            ds = _with_accumulators(plan, scores, (PIECE, k), (PIECE, k))
            _release(smem.v_free.at[stage_v])
            take_turn()
            dq = _add_product(plan, dq, ds.astype(plan.dtype), smem.k.at[stage_k])
            _release(smem.k_free.at[stage_k])
            return dq

        def finish(dq):
            pl.when(warpgroup == 0)(take_turn)
            gradient = dq_gmem.at[batch, queries, head]
            _write(plan, plan.spec.scale, smem.q.at[warpgroup], gradient, dq)

        pl.when(warpgroup == 1)(take_turn)
        _sum(plan, steps, step, (PIECE, plan.width), finish)

    @pl.when(warpgroup == 2)
    def _loads():
        plgpu.set_max_registers(REGISTERS_LOAD, action="decrease")
        kv_head = lax.div(head, plan.groups)

        @pl.loop(0, steps)
        def _(n):
            stage_k, stage_v = lax.rem(n, stages_k), lax.rem(n, stages_v)
            keys = pl.ds((met.first + n) * k, k)
            full = smem.k_full.at[stage_k]
            plgpu.barrier_wait(smem.k_free.at[stage_k])
            plgpu.copy_gmem_to_smem(k_gmem.at[batch, keys, kv_head], smem.k.at[stage_k], full)
            plgpu.copy_gmem_to_smem(pos_gmem.at[batch, keys], smem.pos.at[stage_k], full)
            full = smem.v_full.at[stage_v]
            plgpu.barrier_wait(smem.v_free.at[stage_v])
            plgpu.copy_gmem_to_smem(v_gmem.at[batch, keys, kv_head], smem.v.at[stage_v], full)

        _each(plgpu.barrier_wait, smem.k_free, smem.v_free)


def _kernel(body: Callable, grid: tuple[int, int, int], out_type, scratch: dict, plan: _Plan):
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
        kernel_name=f"attention_hopper{body.__name__.removesuffix('_kernel')}",
    )


def _coordinates() -> tuple[jax.Array, ...]:
    return tuple(map(lax.axis_index, ("batch", "head", "block", "warpgroup")))


def _matrix(plan: _Plan, *shape: int):
    return matrix_smem(shape, plan.dtype, plan.interpret is not None)


def _each(do: Callable, *arrays_of_barriers) -> None:
    """Every buffer is declared free at the start, and awaited at the end: so all waits are alike,
    and no arrival is left unobserved."""
    for barriers in arrays_of_barriers:
        for i in range(barriers.shape[0]):
            do(barriers.at[i])


def _release(barrier) -> None:
    """Gives a buffer back to be loaded into. The fence orders plain loads, as of the numbers per
    query, before what the TMA unit writes."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def _whole(block: jax.Array, met: Runs) -> jax.Array:
    return (block >= met.whole) & (block < met.whole_end)


def _zero(block: jax.Array) -> jax.Array:
    """0, which the compiler cannot know.

    As an index it keeps the address of a tile from being constant in a loop. Of such a tile the
    compiler would hold all descriptors, 16 of 64 bits at width 256, in registers, and spill others.
    """
    return lax.shift_right_logical(block, jnp.int32(31))


def _hide(whole, pos, lo, hi, along_q: Callable, along_k: Callable, s: jax.Array) -> jax.Array:
    """-inf for keys that are not seen; costs nothing in blocks that are seen whole."""

    def hide():
        pos_s = along_k(pos[...], s)
        seen = (pos_s >= along_q(lo[...], s)) & (pos_s < along_q(hi[...], s))
        return jnp.where(seen, s, -jnp.inf)

    return lax.cond(whole, lambda: s, hide)


def _probabilities(
    s: jax.Array, lse: jax.Array, mask: Callable, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """Probabilities, and what times `dP - delta` is the gradient by `scale * s`."""
    s, factor = scores_in_log2(s, spec)
    p = jnp.exp2(mask(s) * factor - lse)
    return p, p if spec.soft_cap is None else p * (1 - s * s)


def _with_accumulators(plan: _Plan, body: Callable, *shapes: tuple[int, int]):
    """`body` of zeroed sums: references for wgmma; values in the interpreter, whose wgmma takes no
    operand in registers, nor a transposed one."""
    if plan.interpret is None:
        return pl.run_scoped(body, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])
    return body(*[jnp.zeros(shape, jnp.float32) for shape in shapes])


def _value(plan: _Plan, acc, in_flight: int = 0) -> jax.Array:
    """A sum, once no more than `in_flight` products after its own are under way."""
    if plan.interpret is None:
        return plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)
    return acc


def _multiply(plan: _Plan, acc, a_ref, b_ref):
    """Starts `acc += a @ b.T`."""
    if plan.interpret is None:
        plgpu.wgmma(acc, a_ref, b_ref.T)
        return acc
    return acc + _dot(a_ref[...], b_ref[...].T)


def _product(plan: _Plan, a_ref, b_ref) -> jax.Array:
    """`a @ b.T`."""
    shape = (a_ref.shape[0], b_ref.shape[0])
    return _with_accumulators(
        plan, lambda acc: _value(plan, _multiply(plan, acc, a_ref, b_ref)), shape
    )


def _add_product(plan: _Plan, acc, a: jax.Array, b_ref):
    """`acc += a @ b`, with `a` in registers."""
    if plan.interpret is None:
        plgpu.wgmma(acc, a, b_ref)
        plgpu.wgmma_wait(0)
        return acc
    return acc + _dot(a, b_ref[...])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _sum(plan: _Plan, steps, step: Callable, shape: tuple[int, int], finish: Callable) -> None:
    """`finish` of the sum to which `step(n, acc) -> acc` adds, for every `n` of `steps`."""

    def run(acc):
        if plan.interpret is not None:
            return finish(lax.fori_loop(0, steps, step, acc))

        @pl.loop(0, steps)
        def _(n):
            step(n, acc)

        return finish(_value(plan, acc))

    _with_accumulators(plan, run, shape)


def _write(plan: _Plan, factor: float, staging, gmem, gradient: jax.Array) -> None:
    """A finished gradient by way of shared memory that nobody else reads any more."""
    staging[...] = (gradient * factor).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, gmem)
    plgpu.wait_smem_to_gmem(0)
