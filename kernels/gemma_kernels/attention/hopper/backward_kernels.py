"""The two kernels of `hopper_backward.py`: what each warpgroup does, and with which tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma_kernels.attention.hopper.tiles import Runs, scores_in_log2
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.mosaic_gpu import PIECE, ROWS, Ops, across, down

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
class Plan:
    """What the kernels know at compile time. `interpret`: parameters of the interpreter."""

    blocks: BackwardBlocks
    groups: int
    width: int
    spec: AttentionSpec
    dtype: jnp.dtype
    interpret: object | None


def dkv_kernel(
    runs_gmem, q_gmem, k_gmem, v_gmem, dout_gmem, rows_gmem, interval_gmem, pos_gmem,
    dk_gmem, dv_gmem, *, plan: Plan, **scratch,
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


def dq_kernel(
    runs_gmem, q_gmem, k_gmem, v_gmem, dout_gmem, rows_gmem, lo_gmem, hi_gmem, pos_gmem,
    dq_gmem, *, plan: Plan, **scratch,
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


def _coordinates() -> tuple[jax.Array, ...]:
    return tuple(map(lax.axis_index, ("batch", "head", "block", "warpgroup")))


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


def _with_accumulators(plan: Plan, body: Callable, *shapes: tuple[int, int]):
    """`body` of zeroed sums: references for wgmma; values in the interpreter, whose wgmma takes no
    operand in registers, nor a transposed one."""
    if plan.interpret is None:
        return pl.run_scoped(body, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])
    return body(*[jnp.zeros(shape, jnp.float32) for shape in shapes])


def _value(plan: Plan, acc, in_flight: int = 0) -> jax.Array:
    """A sum, once no more than `in_flight` products after its own are under way."""
    if plan.interpret is None:
        return plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)
    return acc


def _multiply(plan: Plan, acc, a_ref, b_ref):
    """Starts `acc += a @ b.T`."""
    if plan.interpret is None:
        plgpu.wgmma(acc, a_ref, b_ref.T)
        return acc
    return acc + _dot(a_ref[...], b_ref[...].T)


def _product(plan: Plan, a_ref, b_ref) -> jax.Array:
    """`a @ b.T`."""
    shape = (a_ref.shape[0], b_ref.shape[0])
    return _with_accumulators(
        plan, lambda acc: _value(plan, _multiply(plan, acc, a_ref, b_ref)), shape
    )


def _add_product(plan: Plan, acc, a: jax.Array, b_ref):
    """`acc += a @ b`, with `a` in registers."""
    if plan.interpret is None:
        plgpu.wgmma(acc, a, b_ref)
        plgpu.wgmma_wait(0)
        return acc
    return acc + _dot(a, b_ref[...])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _sum(plan: Plan, steps, step: Callable, shape: tuple[int, int], finish: Callable) -> None:
    """`finish` of the sum to which `step(n, acc) -> acc` adds, for every `n` of `steps`."""

    def run(acc):
        if plan.interpret is not None:
            return finish(lax.fori_loop(0, steps, step, acc))

        @pl.loop(0, steps)
        def _(n):
            step(n, acc)

        return finish(_value(plan, acc))

    _with_accumulators(plan, run, shape)


def _write(plan: Plan, factor: float, staging, gmem, gradient: jax.Array) -> None:
    """A finished gradient by way of shared memory that nobody else reads any more."""
    staging[...] = (gradient * factor).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, gmem)
    plgpu.wait_smem_to_gmem(0)
