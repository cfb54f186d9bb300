"""Attention on Hopper, forward, as one Mosaic GPU kernel.

A block of 384 threads takes two tiles of queries of one head, and the keys that either can see:

    warpgroup 0    queries [0, q)    scores = Q K^T, softmax, out += P V    on tensor cores
    warpgroup 1    queries [q, 2q)   the same, half a turn later
    warpgroup 2    one thread of it asks the TMA unit for blocks of keys and values, `stages` ahead

The two take turns: while one computes its softmax, the other has the tensor cores (ping-pong, as in
FlashAttention-3, arXiv 2407.08608, section 3.1). Scores, weights and the sum stay in registers:

    head   q    k    scores + sum + weights    shared memory: Q + stages * (K + V)
      64   64  128     64 + 32 + 32 registers   16 + 4 * 32 = 144 KB
     128   64  128     64 + 64 + 32 registers   32 + 3 * 64 = 224 KB
     256   64   64     32 + 128 + 16 registers  64 + 2 * 64 = 192 KB      of 232 and 227 KB

Operands are read by TMA in the layout `[B, T, N, H]` in which they come. Blocks beyond their end
read as zeros.

The mask costs nothing where it does nothing: each block runs through its keys in three loops, of
which the middle one, over keys that all its queries see, has no mask (`hopper_tiles`). If the mask
is known at compile time (causal, windowed or none), bounds are arithmetic; else bounds and the
intervals of queries come from memory, and positions of keys with each block at an edge.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma_kernels.attention.hopper.tiles import Runs, key_runs, pad_axis, scores_in_log2
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.mosaic_gpu import (
    COLUMNS,
    LOG2_E,
    LOWEST,
    MATRIX,
    PIECE,
    ROWS,
    SMEM_LIMIT,
    Ops,
    across,
    compiler_params,
    down,
    interpreter,
    matrix_smem,
)

COMPUTE = 2  # warpgroups that compute
REGISTERS_COMPUTE, REGISTERS_LOAD = 232, 40


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles.

    Attributes:
      q: Queries of a warpgroup; a multiple of 64.
      k: Keys of a block; a multiple of 16.
      stages: Blocks of keys and of values in shared memory.
    """

    q: int = 64
    k: int = 128
    stages: int = 2

    def smem(self, width: int) -> int:
        """Bytes of shared memory, without a kilobyte of barriers and sums."""
        return 2 * width * (COMPUTE * self.q + 2 * self.stages * self.k)


@dataclass(frozen=True)
class _Plan:
    """What the kernel knows at compile time."""

    blocks: Blocks
    spec: AttentionSpec
    T: int
    S: int
    groups: int
    width: int
    intervals: bool
    ops: Ops

    @property
    def rows(self) -> int:
        return COMPUTE * self.blocks.q


def default_blocks(width: int) -> Blocks:
    """By width of heads, a multiple of 64."""
    if width <= 64:
        return Blocks(64, 128, 4)
    return Blocks(64, 128, 3) if width <= 128 else Blocks(64, 64, 2)


def check_blocks(blocks: Blocks, width: int) -> None:
    if blocks.q % 64 or blocks.k % 16 or min(blocks.q, blocks.k) < 16 or blocks.stages < 1:
        raise ValueError(f"{blocks} needs q a multiple of 64, k of 16, and at least one stage")
    if blocks.smem(width) > SMEM_LIMIT - 1024:
        raise ValueError(
            f"{blocks} takes {blocks.smem(width)} bytes of shared memory at head width {width}; "
            f"{SMEM_LIMIT - 1024} are there: choose fewer stages or smaller blocks"
        )


def padded_width(H: int) -> int:
    return pl.cdiv(H, PIECE) * PIECE


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lo_BT: jax.Array | None,
    hi_BT: jax.Array | None,
    kv_pos_BS: jax.Array | None,
    spec: AttentionSpec,
    blocks: Blocks,
    return_lse: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Output `[B, T, N, H]`, and `[B, T, N]` log-sum-exp or `None`; see `hopper.attention_hopper`.

    The mask comes from `spec` if it is causal or unmasked, else from the intervals.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    plan = _Plan(
        blocks, spec, T, S, N // K, padded_width(H),
        intervals=spec.masked and not spec.causal, ops=Ops(interpret),
    )  # fmt: skip
    # TMA cuts lengths into eights, and reads zeros beyond the end; the interpreter does not.
    unit_q, unit_k = (plan.rows, blocks.k) if interpret else (8, 8)
    q_BTNH = pad_axis(pad_axis(q_BTNH, 3, PIECE), 1, unit_q)
    k_BSKH, v_BSKH = (pad_axis(pad_axis(x, 3, PIECE), 1, unit_k) for x in (k_BSKH, v_BSKH))
    tiles = pl.cdiv(T, plan.rows)
    mask = ()
    if plan.intervals:
        lo_BT, hi_BT = (pad_axis(x, 1, plan.rows) for x in (jnp.maximum(lo_BT, 0), hi_BT))
        kv_pos_BS = pad_axis(kv_pos_BS, 1, blocks.k, -1)
        mask = (lo_BT, hi_BT, kv_pos_BS, key_runs(lo_BT, hi_BT, kv_pos_BS, plan.rows, blocks.k))

    out_type = [jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)]
    matrix = partial(matrix_smem, dtype=q_BTNH.dtype, interpret=interpret)
    scratch = dict(
        q_smem=matrix((COMPUTE, blocks.q, plan.width)),
        k_smem=matrix((blocks.stages, blocks.k, plan.width)),
        v_smem=matrix((blocks.stages, blocks.k, plan.width)),
        q_full=plgpu.Barrier(num_barriers=COMPUTE),
        k_full=plgpu.Barrier(num_barriers=blocks.stages),
        v_full=plgpu.Barrier(num_barriers=blocks.stages),
        k_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=blocks.stages),
        v_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=blocks.stages),
        turn=plgpu.Barrier(num_arrivals=COMPUTE),
    )
    if return_lse:
        out_type.append(jax.ShapeDtypeStruct((B, N, tiles * plan.rows), jnp.float32))
        scratch["lse_smem"] = plgpu.SMEM((COMPUTE, blocks.q), jnp.float32)

    out_BTNH, *lse_BNT = plgpu.kernel(
        partial(_kernel, plan=plan),
        out_type=out_type,
        scratch_types=scratch,
        grid=(B, tiles, N),
        grid_names=("batch", "tile", "head"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter() if interpret else None,
        kernel_name="attention_hopper",
    )(q_BTNH, k_BSKH, v_BSKH, *mask)
    lse_BTN = jnp.swapaxes(lse_BNT[0][:, :, :T], 1, 2) if return_lse else None
    return out_BTNH[:, :T, :, :H], lse_BTN


def _kernel(q_gmem, k_gmem, v_gmem, *refs, plan: _Plan, **scratch):
    mask_gmem, out_gmem = (refs[:4], refs[4:]) if plan.intervals else ((), refs)
    # Later tiles see more keys under a causal mask: the longest start first.
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    tile = pl.cdiv(plan.T, plan.rows) - 1 - lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    runs = _runs(mask_gmem, batch, tile, plan)

    @pl.when(warpgroup < COMPUTE)
    def _():
        plgpu.set_max_registers(REGISTERS_COMPUTE, action="increase")
        where = (batch, tile, head, warpgroup)
        _compute(q_gmem, mask_gmem, out_gmem, where, runs, scratch, plan)

    @pl.when(warpgroup == COMPUTE)
    def _():
        plgpu.set_max_registers(REGISTERS_LOAD, action="decrease")
        _load(k_gmem.at[batch], v_gmem.at[batch], lax.div(head, plan.groups), runs, scratch, plan)


def _runs(mask_gmem, batch, tile, plan: _Plan) -> Runs:
    """Blocks of keys that this tile of queries meets."""
    if plan.intervals:
        return Runs(*(mask_gmem[3][i, batch, tile] for i in range(4)))
    k = plan.blocks.k
    if not plan.spec.masked:
        return Runs(0, 0, plan.S // k, pl.cdiv(plan.S, k))
    # Key rows of the first and the last query of the tile.
    own_first = tile * plan.rows + plan.S - plan.T
    own_last = own_first + plan.rows - 1
    end = lax.div(lax.clamp(0, own_last + 1, plan.S) + k - 1, k)
    first = whole = jnp.int32(0)
    if plan.spec.window is not None:
        first = lax.div(lax.max(own_first - plan.spec.window + 1, 0), k)
        whole = lax.div(lax.max(own_last - plan.spec.window + 1, 0) + k - 1, k)
    whole = lax.min(whole, end)
    whole_end = lax.max(lax.div(lax.max(own_first + 1, 0), k), whole)
    return Runs(lax.min(first, end), whole, lax.min(whole_end, end), end)


def _load(k_gmem, v_gmem, head, runs: Runs, scratch, plan: _Plan):
    """The loading warpgroup: keys and values into free buffers, in the order of use."""
    k, stages = plan.blocks.k, plan.blocks.stages

    @pl.loop(runs.first, runs.end)
    def _(block):
        turn = block - runs.first
        slot = lax.rem(turn, stages)
        keys = pl.ds(block * k, k)
        for name, gmem in (("k", k_gmem), ("v", v_gmem)):
            free, full = scratch[f"{name}_free"].at[slot], scratch[f"{name}_full"].at[slot]
            pl.when(turn >= stages)(partial(plgpu.barrier_wait, free))
            plgpu.copy_gmem_to_smem(gmem.at[keys, head], scratch[f"{name}_smem"].at[slot], full)

    # Nothing is left unobserved: a buffer is free again at the end.
    for slot in range(stages):

        @pl.when(slot < runs.end - runs.first)
        def _(slot=slot):
            plgpu.barrier_wait(scratch["k_free"].at[slot])
            plgpu.barrier_wait(scratch["v_free"].at[slot])


def _compute(q_gmem, mask_gmem, out_gmem, where, runs: Runs, scratch, plan: _Plan):
    """A computing warpgroup: the output of its tile of queries."""
    batch, tile, head, warpgroup = where
    ops, blocks, stages = plan.ops, plan.blocks, plan.blocks.stages
    q_smem = scratch["q_smem"].at[warpgroup]
    first_query = (tile * COMPUTE + warpgroup) * blocks.q
    queries = pl.ds(first_query, blocks.q)

    # Where the weights are best summed was measured for JAX's `attention_mgpu` on an H100.
    narrow = plan.width <= 128

    def take_turn():
        plgpu.barrier_arrive(scratch["turn"])
        plgpu.barrier_wait(scratch["turn"])

    q_full = scratch["q_full"].at[warpgroup]
    plgpu.copy_gmem_to_smem(q_gmem.at[batch, queries, head], q_smem, q_full)
    interval = None
    if plan.intervals:
        interval = [ops.load(ref.at[batch, queries], ROWS) for ref in mask_gmem[:2]]

    def await_keys(block):
        slot = lax.rem(block - runs.first, stages)
        pl.when(block < runs.end)(partial(plgpu.barrier_wait, scratch["k_full"].at[slot]))

    def step(block, carry, masked: bool):
        acc, top, total = carry
        slot = lax.rem(block - runs.first, stages)
        if masked and plan.intervals:
            pos = ops.load(mask_gmem[2].at[batch, pl.ds(block * blocks.k, blocks.k)], COLUMNS)
        scores = ops.scores(q_smem, scratch["k_smem"].at[slot], meanwhile=take_turn)
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        scores, factor = scores_in_log2(scores, plan.spec)
        if masked:
            if plan.intervals:
                lo, hi = (down(x, scores) for x in interval)
                seen = (across(pos, scores) >= lo) & (across(pos, scores) < hi)
            else:
                seen = _seen(scores.shape, first_query, block * blocks.k, plan)
            scores = jnp.where(seen, scores, -jnp.inf)

        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * factor - down(new_top, scores))
        acc = acc * down(keep, acc)
        total = total * keep
        packed = weights.astype(q_gmem.dtype)
        if narrow:  # nothing of the softmax may sink below the barrier that ends the turn
            total = total + weights.sum(axis=1)
            acc, new_top, total, packed = lax.optimization_barrier((acc, new_top, total, packed))
        plgpu.barrier_arrive(scratch["turn"])
        plgpu.barrier_wait(scratch["v_full"].at[slot])
        plgpu.barrier_wait(scratch["turn"])
        if not narrow:
            total = total + weights.sum(axis=1)
        acc = ops.add_product(
            acc, packed, scratch["v_smem"].at[slot], meanwhile=partial(await_keys, block + 1)
        )
        plgpu.barrier_arrive(scratch["v_free"].at[slot])
        return acc, new_top, total

    plgpu.barrier_wait(q_full)
    await_keys(runs.first)
    pl.when(warpgroup == 1)(take_turn)
    carry = (
        ops.full((blocks.q, plan.width), 0, MATRIX),
        ops.full((blocks.q,), LOWEST, ROWS),
        ops.full((blocks.q,), 0, ROWS),
    )
    carry = _loop(runs.first, runs.whole, partial(step, masked=True), carry)
    carry = _loop(runs.whole, runs.whole_end, partial(step, masked=False), carry)
    acc, top, total = _loop(runs.whole_end, runs.end, partial(step, masked=True), carry)
    pl.when(warpgroup == 0)(take_turn)

    if plan.intervals:  # whole blocks were not masked for queries that see nothing
        total = jnp.where(interval[0] < interval[1], total, 0.0)
    some = total > 0
    acc = acc * down(jnp.where(some, 1 / total, 0.0), acc)
    q_smem[...] = acc.astype(q_gmem.dtype)
    if len(out_gmem) == 2:
        lse_smem = scratch["lse_smem"].at[warpgroup]
        lse_smem[...] = jnp.where(some, top * (1 / LOG2_E) + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, out_gmem[0].at[batch, queries, head])
    if len(out_gmem) == 2:
        plgpu.copy_smem_to_gmem(lse_smem, out_gmem[1].at[batch, head, queries])
    plgpu.wait_smem_to_gmem(0)


def _loop(start, stop, body, carry):
    """`lax.fori_loop`; nothing is compiled for bounds that are known to be empty."""
    known = isinstance(start, int) and isinstance(stop, int)
    return carry if known and start >= stop else lax.fori_loop(start, stop, body, carry)


def _seen(shape, first_query, first_key, plan: _Plan) -> jax.Array:
    """A mask known at compile time, for a tile."""
    column = plan.ops.iota(shape, 1)
    if not plan.spec.masked:
        return column < plan.S - first_key
    ahead = column - plan.ops.iota(shape, 0)
    own = first_query + plan.S - plan.T - first_key  # column of the first query's own key
    seen = ahead <= own
    if plan.spec.window is not None:
        seen &= ahead > own - plan.spec.window
    return seen
