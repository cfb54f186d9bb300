"""Attention of a few new tokens over long caches on Hopper, as a Mosaic GPU kernel.

Decoding is bound by reading the cache, which therefore is read once, in whole rows, by as many
multiprocessors as there are: the key axis is split among them, and what they get is merged by
log-sum-exp. All query heads and new tokens that share a key head are rows of one matrix, padded to
the 64 of a wgmma; the tensor cores then idle half of the time, and are still ahead of memory.

    cache of one row and head   |........|#######|#######|#######|###.....|
    what some query sees                 |<- first                  end ->|
    splits (thread blocks)               |   0   |   1   |   2   |   3    |
    warpgroups 0 and 1                   | 0 | 1 | 0 | 1 |

A split has two warpgroups that compute, each on its half of the split's keys, and one that loads
for both. Their halves are merged in shared memory; splits are merged by XLA, which reads
`[splits, rows, H]` per head: at batch 1 and 131,072 keys less than a hundredth of the cache.

Keys and values in int8 are copied as they are; a warpgroup then widens each block to the dtype of
the queries, in shared memory, as wgmma takes its second operand from there. Scales apply to scores
and to weights, not to keys and values.

Shared memory of a thread block, in KB, with keys of a block:

    H    cache  k    Q    K and V in flight  widened  result
    256  16 bit  64  32   2 * 64             -        64  = 224
    256  int8    64  32   2 * 32             64       64  = 224
    128  16 bit  64  16   2 * 2 * 32         -        32  = 176
    128  int8    64  16   2 * 2 * 16         32       32  = 144

Local letters: R rows: query heads and new tokens of a key head; P splits.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma_kernels.attention.hopper.tiles import classify, pad_axis, runs, scores_in_log2
from gemma_kernels.attention.mask import everything
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.mosaic_gpu import (
    COLUMNS,
    LOG2_E,
    LOWEST,
    MATRIX,
    PACKED,
    PIECE,
    ROWS,
    Ops,
    across,
    compiler_params,
    down,
    interpreter,
    joins_batch,
    matrix_smem,
)

PROCESSORS = 132  # of an H100 or H200 (SXM)
HALVES = 2  # of a split: warpgroups that compute
MOST_TOKENS = 16


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles.

    Attributes:
      k: Keys of a block; a multiple of 16.
      stages: Blocks of keys and of values in shared memory, per warpgroup.
    """

    k: int = 64
    stages: int = 1


@dataclass(frozen=True)
class _Plan:
    """What the kernel knows at compile time."""

    blocks: Blocks
    spec: AttentionSpec
    H: int
    splits: int
    stored: int
    scaled: bool
    stacked: bool
    ops: Ops


def decode_attention_hopper(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lo_BT: jax.Array | None,
    hi_BT: jax.Array | None,
    kv_pos_BS: jax.Array | None,
    spec: AttentionSpec,
    *,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    layer: jax.Array | None = None,
    return_lse: bool = False,
    splits: int | None = None,
    blocks: Blocks | None = None,
    interpret: bool | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of `T` up to 16 new tokens over a cache, `[B, T, N, H]` in the queries' dtype.

    Args:
      q_BTNH: bfloat16 or float16.
      k_BKSH, v_BKSH: Heads before slots; in the queries' dtype, or int8 with scales.
      lo_BT, hi_BT, kv_pos_BS: Query `t` sees the slots with position in `[lo, hi)`, in any order;
        not looked at if `spec` says that there is no mask.
      k_scale_BKS, v_scale_BKS: float32 factors of the slots of int8 caches.
      layer: int32; caches and scales are stacks of layers, `[L, B, ...]`, and this one is read
        where it lies. Not under `vmap`.
      return_lse: Return float32 `[B, T, N]` as well, the logarithm of the softmax's denominator;
        -inf for queries that see nothing.
      splits: Thread blocks per row and key head; default: so that they fill the chip.
      blocks: Sizes of tiles; default: by head width.
      interpret: Run on a CPU, by the interpreter of Mosaic GPU.

    Raises:
      NotImplementedError: A call that this kernel does not serve; says why.
      ValueError: Operands or sizes that do not fit.
    """
    _check(q_BTNH, k_BKSH, v_BKSH, k_scale_BKS, v_scale_BKS, spec)
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[-3:-1]
    G = N // K
    blocks = blocks or (Blocks(64, 1) if H > 128 else Blocks(64, 2))
    tiles = pl.cdiv(G * T, PIECE)
    plan = _Plan(
        blocks, spec, H,
        splits=splits or default_splits(B * K * tiles, pl.cdiv(S, HALVES * blocks.k)),
        stored=min(pl.cdiv(G * T, 8) * 8, PIECE),
        scaled=k_scale_BKS is not None,
        stacked=layer is not None,
        ops=Ops(bool(interpret)),
    )  # fmt: skip
    if not spec.masked:
        lo_BT, hi_BT, kv_pos_BS = everything(B, T, S)
    scales = (k_scale_BKS, v_scale_BKS) if plan.scaled else ()
    if layer is None:
        run = joins_batch(partial(_run, plan=plan))
    else:  # a layer is some rows of a cache of more; scales are few, and rather copied
        k_BKSH, v_BKSH = (x.reshape(-1, *x.shape[2:]) for x in (k_BKSH, v_BKSH))
        scales = [lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in scales]
        run = partial(_run, plan=plan, first_row=layer * B)
    out_BKPRH, lse_BKPR = run(q_BTNH, lo_BT, hi_BT, kv_pos_BS, k_BKSH, v_BKSH, *scales)

    lse_BKR = jax.nn.logsumexp(lse_BKPR, axis=2)
    # Splits that saw nothing weigh nothing, also where all did.
    weights_BKPR = jnp.exp(lse_BKPR - jnp.where(lse_BKR == -jnp.inf, 0, lse_BKR)[:, :, None])
    out_BKRH = jnp.sum(weights_BKPR[..., None] * out_BKPRH, axis=2)

    def rows_to_heads(x_BKR_):
        x_BKTG_ = x_BKR_[:, :, : G * T].reshape(B, K, T, G, *x_BKR_.shape[3:])
        return jnp.moveaxis(x_BKTG_, 1, 2).reshape(B, T, N, *x_BKR_.shape[3:])

    out_BTNH = rows_to_heads(out_BKRH).astype(q_BTNH.dtype)
    return (out_BTNH, rows_to_heads(lse_BKR)) if return_lse else out_BTNH


def default_splits(heads: int, most: int) -> int:
    """The fewest splits of `heads` thread blocks that leave a twentieth of the chip idle, or less.

    At most `most`; if none does, those that leave the least.
    """

    def idle(splits: int) -> float:
        rounds = heads * splits / PROCESSORS
        return 1 - rounds / -(-rounds // 1)

    choices = range(1, max(most, 1) + 1)
    return next((n for n in choices if idle(n) <= 0.05), min(choices, key=idle))


def _check(q_BTNH, k_BKSH, v_BKSH, k_scale_BKS, v_scale_BKS, spec: AttentionSpec) -> None:
    B, T, N, H = q_BTNH.shape
    if k_BKSH.shape != v_BKSH.shape or (k_BKSH.shape[-4], k_BKSH.shape[-1]) != (B, H):
        raise ValueError(
            f"keys {k_BKSH.shape} and values {v_BKSH.shape} must be [B={B}, K, S, H={H}]"
        )
    K, S = k_BKSH.shape[-3:-1]
    if N % K:
        raise ValueError(f"query heads N={N} must be a multiple of key/value heads K={K}")
    if (k_scale_BKS is None) != (v_scale_BKS is None):
        raise ValueError("keys and values have scales, or neither has")
    for name, scale in {"k_scale_BKS": k_scale_BKS, "v_scale_BKS": v_scale_BKS}.items():
        if scale is not None and scale.shape != k_BKSH.shape[:-1]:
            raise ValueError(f"{name} has shape {scale.shape}; the cache needs {k_BKSH.shape[:-1]}")
    if spec.causal:
        raise ValueError("causal=True states a mask by rows; caches have positions")
    if not spec.softmax_in_float32:
        raise NotImplementedError("its softmax is in float32 only")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries are {q_BTNH.dtype}; it takes bfloat16 and float16")
    cached = jnp.int8 if k_scale_BKS is not None else q_BTNH.dtype
    if k_BKSH.dtype != cached or v_BKSH.dtype != cached:
        raise NotImplementedError(
            f"the cache is {k_BKSH.dtype} and {v_BKSH.dtype}; it takes {q_BTNH.dtype} as the "
            "queries, or int8 with scales"
        )
    if T > MOST_TOKENS:
        raise NotImplementedError(f"{T} new tokens; it takes up to {MOST_TOKENS}")
    if H not in (64, 128, 256):
        raise NotImplementedError(f"heads of width {H}; it takes 64, 128 and 256")
    if S % 8:
        raise NotImplementedError(f"a cache of {S} slots; it takes multiples of 8")


def _run(q_BTNH, lo_BT, hi_BT, kv_pos_BS, k_BKSH, v_BKSH, *scales, plan: _Plan, first_row=0):
    """Results of all splits, normalised: float32 `[B, K, splits, rows, H]` and log-sum-exp.

    Keys and values may have more rows than the queries, whose first is `first_row`.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    G, k, stages = N // K, plan.blocks.k, plan.blocks.stages
    interpret = plan.ops.interpret
    q_BKRH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 2, 1).reshape(B, K, T * G, H)
    q_BKRH = pad_axis(q_BKRH, 2, PIECE)
    tiles = q_BKRH.shape[2] // PIECE
    kv_pos_BS = pad_axis(kv_pos_BS, 1, k, -1)
    scales = [pad_axis(x.astype(jnp.float32), 2, k) for x in scales]
    lo_BT = jnp.maximum(lo_BT, 0)
    live = runs(*classify(lo_BT, hi_BT, kv_pos_BS, T, k))
    row_B = first_row + jnp.arange(B, dtype=jnp.int32)
    live_3B = jnp.stack([live.first[:, 0], live.end[:, 0], row_B])
    lo_BR, hi_BR = (pad_axis(jnp.repeat(x, G, axis=1), 1, PIECE) for x in (lo_BT, hi_BT))
    if interpret:  # which does not read zeros beyond the end
        k_BKSH, v_BKSH = (pad_axis(x, 2, k) for x in (k_BKSH, v_BKSH))

    matrix = partial(matrix_smem, interpret=interpret)
    buffers = partial(plgpu.Barrier, num_barriers=HALVES * stages)
    scratch = dict(
        q_smem=matrix((PIECE, H), q_BTNH.dtype),
        k_smem=matrix((HALVES * stages, k, H), k_BKSH.dtype, columns=PIECE),
        v_smem=matrix((HALVES * stages, k, H), v_BKSH.dtype, columns=PIECE),
        out_smem=matrix((PIECE, H), jnp.float32, columns=PIECE // 2),
        top_smem=plgpu.SMEM((PIECE,), jnp.float32),
        total_smem=plgpu.SMEM((PIECE,), jnp.float32),
        q_full=plgpu.Barrier(),
        k_full=buffers(),
        v_full=buffers(),
        k_free=buffers(),
        v_free=buffers(),
        merge=plgpu.Barrier(),
    )
    if plan.scaled:
        scratch["wide_smem"] = matrix((HALVES, k, H), q_BTNH.dtype)
    out_BKPRH, lse_BKPR = plgpu.kernel(
        partial(_kernel, plan=plan),
        out_type=[
            jax.ShapeDtypeStruct((B, K, plan.splits, tiles * plan.stored, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, plan.splits, tiles * PIECE), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(B, K, plan.splits, tiles),
        grid_names=("batch", "head", "split", "tile"),
        num_threads=HALVES + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter() if interpret else None,
        kernel_name="decode_attention_hopper",
    )(q_BKRH, k_BKSH, v_BKSH, lo_BR, hi_BR, kv_pos_BS, live_3B, *scales)
    return out_BKPRH, lse_BKPR[..., : out_BKPRH.shape[3]]


def _kernel(q_gmem, k_gmem, v_gmem, lo_gmem, hi_gmem, pos_gmem, live_gmem, *refs, plan, **scratch):
    scales_gmem, (out_gmem, lse_gmem) = refs[:-2], refs[-2:]
    where = batch, head, split, tile = [
        lax.axis_index(name) for name in ("batch", "head", "split", "tile")
    ]
    warpgroup = lax.axis_index("warpgroup")

    def bounds(warpgroup):
        """Blocks of keys of a half."""
        first, end = live_gmem[0, batch], live_gmem[1, batch]
        half = lax.div(end - first + HALVES * plan.splits - 1, HALVES * plan.splits)
        start = first + (HALVES * split + warpgroup) * half
        return lax.min(start, end), lax.min(start + half, end)

    @pl.when(warpgroup < HALVES)
    def _():
        plgpu.set_max_registers(240, action="increase")
        rows = pl.ds(tile * PIECE, PIECE)
        columns_gmem = pos_gmem.at[batch], [ref.at[batch, head] for ref in scales_gmem]
        interval_gmem = [ref.at[batch, rows] for ref in (lo_gmem, hi_gmem)]
        q_full = scratch["q_full"]

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(q_gmem.at[batch, head, rows], scratch["q_smem"], q_full)

        plgpu.barrier_wait(q_full)
        sums = _attend(warpgroup, bounds(warpgroup), interval_gmem, *columns_gmem, scratch, plan)
        pl.when(warpgroup == 1)(lambda: _hand_over(sums, scratch))
        pl.when(warpgroup == 0)(lambda: _finish(sums, where, out_gmem, lse_gmem, scratch, plan))

    @pl.when(warpgroup == HALVES)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        ranges = [bounds(w) for w in range(HALVES)]
        row = live_gmem[2, batch] if plan.stacked else batch
        _load(k_gmem.at[row, head], v_gmem.at[row, head], ranges, scratch, plan)


def _load(k_gmem, v_gmem, ranges, scratch, plan: _Plan):
    """The loading warpgroup: blocks for both halves, in turns."""
    k, stages = plan.blocks.k, plan.blocks.stages

    # Keys of both halves first: their buffers are the first to be free again.
    jobs = [
        (warpgroup, *bounds, name, gmem)
        for name, gmem in (("k", k_gmem), ("v", v_gmem))
        for warpgroup, bounds in enumerate(ranges)
    ]

    @pl.loop(0, ranges[0][1] - ranges[0][0])  # the second half is no longer than the first
    def _(turn):
        for warpgroup, start, stop, name, gmem in jobs:
            slot = warpgroup * stages + lax.rem(turn, stages)

            @pl.when(start + turn < stop)
            def _(slot=slot, start=start, name=name, gmem=gmem):
                free, full = (scratch[f"{name}_{state}"].at[slot] for state in ("free", "full"))
                pl.when(turn >= stages)(partial(plgpu.barrier_wait, free))
                keys = pl.ds((start + turn) * k, k)
                plgpu.copy_gmem_to_smem(gmem.at[keys], scratch[f"{name}_smem"].at[slot], full)

    # Nothing is left unobserved: a buffer is free again at the end.
    for warpgroup, (start, stop) in enumerate(ranges):
        for stage in range(stages):

            @pl.when(stage < stop - start)
            def _(slot=warpgroup * stages + stage):
                plgpu.barrier_wait(scratch["k_free"].at[slot])
                plgpu.barrier_wait(scratch["v_free"].at[slot])


def _attend(warpgroup, bounds, interval_gmem, pos_gmem, scales_gmem, scratch, plan: _Plan):
    """Unnormalised sum, greatest score in log2, and sum of weights over a half's blocks."""
    ops, k, stages = plan.ops, plan.blocks.k, plan.blocks.stages
    start, stop = bounds

    def operand(name, slot, number):
        """A block as wgmma takes it, once it is there."""
        plgpu.barrier_wait(scratch[f"{name}_full"].at[slot])
        block, free = scratch[f"{name}_smem"].at[slot], scratch[f"{name}_free"].at[slot]
        if not plan.scaled:
            return block, partial(plgpu.barrier_arrive, free)
        # Blocks are never negative. As the compiler does not know, it works out addresses anew for
        # each block, where it would keep more of them than there are registers.
        wide = scratch["wide_smem"].at[warpgroup + lax.min(number, 0)]
        for columns in _pieces(plan.H):
            wide[:, columns] = ops.laid(block[:, columns], PACKED).astype(wide.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(free)
        return wide, lambda: None

    def step(block, carry):
        acc, top, total = carry
        slot = warpgroup * stages + lax.rem(block - start, stages)

        def column(ref):  # loaded late: registers are few
            return ops.load(ref.at[pl.ds(block * k, k)], COLUMNS)

        k_block, release = operand("k", slot, block)
        scores = ops.scores(scratch["q_smem"], k_block)
        release()
        if plan.scaled:
            scores = scores * across(column(scales_gmem[0]), scores)
        scores, factor = scores_in_log2(scores, plan.spec)
        pos = across(column(pos_gmem), scores)
        lo, hi = (down(ops.load(ref, ROWS), scores) for ref in interval_gmem)
        seen = (pos >= lo) & (pos < hi)
        scores = jnp.where(seen, scores, -jnp.inf)

        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * factor - down(new_top, scores))
        total = total * keep + weights.sum(axis=1)
        if plan.scaled:
            weights = weights * across(column(scales_gmem[1]), weights)
        v_block, release = operand("v", slot, block)
        acc = ops.add_product(
            acc * down(keep, acc), weights.astype(scratch["q_smem"].dtype), v_block
        )
        release()
        return acc, new_top, total

    nothing = (
        ops.full((PIECE, plan.H), 0, MATRIX),
        ops.full((PIECE,), LOWEST, ROWS),
        ops.full((PIECE,), 0, ROWS),
    )
    return lax.fori_loop(start, stop, step, nothing)


def _hand_over(sums, scratch):
    for name, value in zip(("out", "top", "total"), sums, strict=True):
        scratch[f"{name}_smem"][...] = value
    plgpu.barrier_arrive(scratch["merge"])


def _finish(sums, where, out_gmem, lse_gmem, scratch, plan: _Plan):
    """Merges the other half's sums with one's own, and writes the split's result."""
    batch, head, split, tile = where
    ops, out_smem = plan.ops, scratch["out_smem"]
    acc, top, total = sums
    plgpu.barrier_wait(scratch["merge"])
    other_top = ops.load(scratch["top_smem"], ROWS)
    other_total = ops.load(scratch["total_smem"], ROWS)
    new_top = jnp.maximum(top, other_top)
    keep, other_keep = jnp.exp2(top - new_top), jnp.exp2(other_top - new_top)
    total = total * keep + other_total * other_keep
    some = total > 0
    inverse = jnp.where(some, 1 / total, 0.0)
    for columns in _pieces(plan.H):
        piece, other = acc[:, columns], ops.laid(out_smem[:, columns], MATRIX)
        keep_piece, keep_other = (down(x * inverse, piece) for x in (keep, other_keep))
        out_smem[:, columns] = piece * keep_piece + other * keep_other
    scratch["top_smem"][...] = jnp.where(some, new_top * (1 / LOG2_E) + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    stored = pl.ds(tile * plan.stored, plan.stored)
    plgpu.copy_smem_to_gmem(
        out_smem.at[pl.ds(0, plan.stored)], out_gmem.at[batch, head, split, stored]
    )
    rows = pl.ds(tile * PIECE, PIECE)
    plgpu.copy_smem_to_gmem(scratch["top_smem"], lse_gmem.at[batch, head, split, rows])
    plgpu.wait_smem_to_gmem(0)


def _pieces(H: int) -> list[slice]:
    """Columns in pieces, so that a second matrix never lies in registers as a whole."""
    size = min(H, PIECE)
    return [slice(start, start + size) for start in range(0, H, size)]
