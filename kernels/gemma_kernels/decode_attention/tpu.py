"""Attention of a few new tokens over long caches on TPU, as a Pallas kernel.

Decoding is bound by reading the cache, so the kernel is built around its copies. The cache is cut
into items; those that no query of their row sees are left out by a list made on the device, and
the grid walks over the rest, whichever rows they belong to:

    cache [B, K, S, H]          item: `rows` rows x all heads x `keys` slots
        row 0   |##|##|#.|..|   step 0: items (0,0) (0,1)      (row, block)
        row 1   |#.|..|..|..|   step 1: items (0,2) (1,0)
        row 2   |##|##|##|#.|   step 2: items (2,0) (2,1)  ... two copies ahead, two buffers

A ring of a window's length is one block; then an item holds several rows of the batch. Ragged rows
cost what they hold, an order of slots is never assumed, and a chip with two cores halves the list;
their results meet by log-sum-exp.

Within an item, all query heads and new tokens that share a key head are rows of one matrix, and
keys and values are the stationary operand of the matrix unit: each tile of them is loaded into it
once, for 16 rows (8 in float32) that stream past. So scores are `[rows, keys]`, and the softmax
works on full registers. Heads of 128 go in pairs, side by side as one of 256, against queries with
zeros in the other half: matrix units are up to 256 wide. Each item makes its own softmax, so that
an item's latencies hide behind the others' products; sums per row of the batch are kept in VMEM.

An int8 cache enters the matrix unit as it is, where that multiplies such numbers: half the tiles of
widened ones. Queries and weights are then written in two digits (`_digits`), rows of one matrix as
well, and finer than bfloat16.

Memory of one core, in VMEM: two buffers of `items` items (`tpu_blocks.STEP_BYTES` each, keys
and values together), queries and float32 sums of the whole batch. `_check` refuses what does not
fit.

Local letters: J key heads after folding; R rows: query heads and new tokens of one; W width of a
row; I items.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.decode_attention.tpu_blocks import LANES, Blocks, default_blocks

MASKED = -1e30
LOWEST = -1e29  # of a row's maximum: a row that sees nothing gets weights 0, not 1
EMPTY = (LOWEST, 0.0, 0.0)  # maximum, sum of weights, weighted sum of values, of no keys
LOG2_E = math.log2(math.e)
CHUNK = 8 * 1024  # scores of one softmax
WAVE = 16 * CHUNK  # scores that are in flight together
BASE = 128  # of a digit in an int8 product
MOST_INTEGERS = 1024  # in one sum: 127 * BASE * 128 times as much is below 2**31
VMEM = 56 * 2**20  # of 64 MiB in the smallest chips


@dataclass(frozen=True)
class _Plan:
    """What the kernel knows at compile time.

    Attributes:
      heads: Matrices of queries per row of the batch.
      fold: Key heads that share one.
      size: Rows of such a matrix.
      width: Its columns.
      held: Blocks of a cache.
      integers: Whether products are those of int8 numbers.
    """

    blocks: Blocks
    heads: int
    fold: int
    size: int
    width: int
    held: int
    batch: int
    spec: AttentionSpec
    dtype: jnp.dtype
    scaled: bool
    integers: bool

    @property
    def once(self) -> bool:
        """Whether a row of the batch is done with one item."""
        return self.held == 1 and self.blocks.cores == 1

    @property
    def kv_dtype(self) -> jnp.dtype:
        """Of keys and values in a product."""
        return jnp.dtype(jnp.int8) if self.integers else self.dtype

    @property
    def chunk(self) -> int:
        """Keys of one softmax."""
        most = max(CHUNK // self.size, LANES) // LANES
        return LANES * max(n for n in range(1, most + 1) if self.blocks.keys % (n * LANES) == 0)


def decode_attention_tpu(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    *,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    layer: jax.Array | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
    integers: bool | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Same result as `reference.decode_attention_reference`.

    Args:
      blocks: How to cut the cache; default: by shape.
      integers: Whether int8 caches are multiplied as they are, by bfloat16 queries and weights in
        two digits; default: if the chip has such products.
      interpret: Run without a TPU, by Pallas' interpreter.

    Raises:
      NotImplementedError: A call that this kernel does not serve; says why.
      ValueError: Blocks that do not fit.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[-3:-1]
    if not spec.softmax_in_float32:
        raise NotImplementedError("its softmax is in float32 only")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries are {q_BTNH.dtype}; it takes bfloat16 and float32")
    if S % LANES:
        raise NotImplementedError(f"a cache of {S} slots; it takes multiples of {LANES}")
    if H % LANES:
        raise NotImplementedError(f"heads of width {H}; it takes multiples of {LANES}")
    if blocks is None:
        cores = 1 if interpret else pltpu.get_tpu_info().num_cores
        blocks = default_blocks((B, K, S, H), k_BKSH.dtype.itemsize, cores)
    if integers is None:
        integers = bool(interpret) or pltpu.get_tpu_info().int8_ops_per_second > 0
    scaled = k_scale_BKS is not None
    fold = 2 if H == LANES and K % 2 == 0 and not scaled else 1
    dtype = q_BTNH.dtype if scaled else jnp.promote_types(q_BTNH.dtype, k_BKSH.dtype)
    tile = 32 // dtype.itemsize
    plan = _Plan(
        blocks=blocks,
        heads=K // fold,
        fold=fold,
        size=pl.cdiv(fold * N // K * T, tile) * tile,
        width=fold * H,
        held=S // blocks.keys,
        batch=B,
        spec=spec,
        dtype=dtype,
        scaled=scaled,
        integers=integers and scaled and dtype == jnp.bfloat16 and H <= MOST_INTEGERS,
    )
    _check(plan, B, K, S, k_BKSH.dtype.itemsize)
    caches = [k_BKSH, v_BKSH, *((k_scale_BKS, v_scale_BKS) if scaled else ())]
    # A layer of a stack is some rows of a cache of more.
    first_row = jnp.int32(0) if layer is None else jnp.int32(layer) * B
    caches = [x.reshape(-1, *x.shape[x.ndim - n :]) for x, n in zip(caches, (3, 3, 2, 2))]
    out_BJRW, lse_BJR = _run(
        _fold(q_BTNH.astype(dtype), plan), caches, first_row,
        _limits(lo_BT, hi_BT, plan), lo_BT, hi_BT, kv_pos_BS, plan, interpret,
    )  # fmt: skip
    out_BTNH = _unfold(out_BJRW, plan, N, T, H).astype(q_BTNH.dtype)
    if not return_lse:
        return out_BTNH
    rows = lse_BJR[:, :, : fold * N // K * T].reshape(B, N, T)
    return out_BTNH, jnp.moveaxis(rows, 2, 1)


def _check(plan: _Plan, B: int, K: int, S: int, itemsize: int) -> None:
    blocks = plan.blocks
    if blocks.keys % LANES or blocks.keys < LANES or S % blocks.keys:
        raise ValueError(
            f"keys={blocks.keys} must be a multiple of {LANES} that divides the cache's {S} slots"
        )
    if B % blocks.rows or (blocks.rows > 1 and plan.held > 1):
        raise ValueError(
            f"rows={blocks.rows} must divide the batch of {B}, and be 1 for caches of more than "
            f"one block (here {plan.held})"
        )
    if plan.once and B % (blocks.rows * blocks.items):
        raise ValueError(
            f"with one block per cache, rows={blocks.rows} x items={blocks.items} must divide the "
            f"batch of {B}"
        )
    cached = 4 * blocks.items * blocks.rows * K * blocks.keys * plan.width // plan.fold * itemsize
    # Twice each, as the pipeline has them; columns and intervals take a whole register's lanes. Two
    # digits are the bytes of one bfloat16.
    per_row = plan.width * (plan.dtype.itemsize + 4) + (2 + plan.integers) * LANES * 4
    queries = 2 * B * plan.size * (plan.heads * per_row + LANES * 4)
    if cached + queries > VMEM:
        raise NotImplementedError(
            f"{cached + queries:,} bytes of cache, queries and sums in VMEM, of {VMEM:,}; "
            "split the batch"
        )


def _fold(q_BTNH: jax.Array, plan: _Plan) -> jax.Array:
    """Queries as `[B, J, R, W]`, one matrix per `fold` key heads: rows (head, group, t).

    Each key head has its own columns; a row is zero in those of others.
    """
    B, H = len(q_BTNH), q_BTNH.shape[3]
    q_BJfRH = jnp.moveaxis(q_BTNH, 1, 2).reshape(B, plan.heads, plan.fold, -1, H)
    own_ff11 = jnp.eye(plan.fold, dtype=q_BTNH.dtype)[:, :, None, None]
    q_BJfRfH = jnp.moveaxis(q_BJfRH[:, :, :, None] * own_ff11, 3, 4)
    q_BJRW = q_BJfRfH.reshape(B, plan.heads, -1, plan.width)
    return jnp.pad(q_BJRW, ((0, 0), (0, 0), (0, plan.size - q_BJRW.shape[2]), (0, 0)))


def _unfold(out_BJRW: jax.Array, plan: _Plan, N: int, T: int, H: int) -> jax.Array:
    """The inverse of `_fold`."""
    B, rows = len(out_BJRW), N // plan.heads * T
    out_BJfRfH = out_BJRW[:, :, :rows].reshape(B, plan.heads, plan.fold, -1, plan.fold, H)
    own = jnp.arange(plan.fold)
    out_BJfRH = jnp.moveaxis(out_BJfRfH[:, :, own, :, own], 0, 2)
    return jnp.moveaxis(out_BJfRH.reshape(B, N, T, H), 2, 1)


def _limits(lo_BT: jax.Array, hi_BT: jax.Array, plan: _Plan) -> jax.Array:
    """`[B, R, 2]`: the interval of each row of the matrices of queries; padding sees nothing."""
    B, T = lo_BT.shape
    limits_B1T2 = jnp.stack([jnp.maximum(lo_BT, 0), hi_BT], axis=-1)[:, None]
    copies = plan.size // T
    limits_BR2 = jnp.broadcast_to(limits_B1T2, (B, copies, T, 2)).reshape(B, -1, 2)
    return jnp.pad(limits_BR2, ((0, 0), (0, plan.size - limits_BR2.shape[1]), (0, 0)))


def _items(lo_BT, hi_BT, kv_pos_BS, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Numbers `row * blocks + block` of all items, those first in which something is seen, and how
    many these are (as `[1]`). A cache of one block is read as a whole."""
    groups = plan.batch // plan.blocks.rows
    if plan.held == 1:
        return jnp.arange(groups, dtype=jnp.int32), jnp.full((1,), groups, jnp.int32)
    some_BT = hi_BT > lo_BT
    first_B1 = jnp.min(jnp.where(some_BT, lo_BT, jnp.iinfo(jnp.int32).max), 1, keepdims=True)
    last_B1 = jnp.max(jnp.where(some_BT, hi_BT, 0), 1, keepdims=True)
    seen_BS = (kv_pos_BS >= jnp.maximum(first_B1, 0)) & (kv_pos_BS < last_B1)
    live_I = jnp.any(seen_BS.reshape(-1, plan.blocks.keys), axis=1)
    order_I = jnp.argsort(~live_I, stable=True).astype(jnp.int32)
    return order_I, jnp.sum(live_I, dtype=jnp.int32)[None]


def _run(q_BJRW, caches, first_row, limits_BR2, lo_BT, hi_BT, kv_pos_BS, plan, interpret):
    """The kernel, and the meeting of its cores."""
    blocks = plan.blocks
    (_, K, _, H), B = caches[0].shape, plan.batch
    order_I, count_1 = _items(lo_BT, hi_BT, kv_pos_BS, plan)
    steps = jnp.maximum(pl.cdiv(count_1[0], blocks.items * blocks.cores), 1)
    if plan.held == 1:
        steps = pl.cdiv(len(order_I), blocks.items * blocks.cores)
    queries = _left(q_BJRW, plan)
    # Items as the major axis; for a cache of one block, rows of the batch follow.
    pos_Ib1S = kv_pos_BS.reshape(-1, blocks.rows, 1, blocks.keys)
    sums = [(blocks.cores, B, plan.heads, plan.size, n) for n in (1, 1, plan.width)]

    def whole(shape):
        return pl.BlockSpec(shape, lambda core, step, *_: (0,) * len(shape))

    def per_core(shape):
        return pl.BlockSpec((None, *shape[1:]), lambda core, step, *_: (core, 0, 0, 0, 0))

    anywhere = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    buffer = (2, blocks.items, blocks.rows)
    kv_buffer = pltpu.VMEM((*buffer, K, blocks.keys, H), caches[0].dtype)
    outs = pl.pallas_call(
        partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(blocks.cores, steps),
            in_specs=[
                *[whole(x.shape) for x in queries],
                whole(limits_BR2.shape),
                *[anywhere] * (1 + len(caches)),
            ],
            out_specs=[per_core(shape) for shape in sums],
            scratch_shapes=[
                [pltpu.VMEM((*buffer, 1, blocks.keys), jnp.int32), kv_buffer, kv_buffer]
                + [pltpu.VMEM((*buffer, K, blocks.keys), jnp.float32)] * (len(caches) - 2),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="decode_attention",
    )(count_1, order_I, first_row[None], *queries, limits_BR2, pos_Ib1S, *caches)
    top_BJR1, total_BJR1, sum_BJRW = _join([[x[c] for x in outs] for c in range(blocks.cores)])
    none_BJR1 = total_BJR1 == 0
    safe_BJR1 = jnp.where(none_BJR1, 1.0, total_BJR1)
    lse_BJR1 = jnp.where(none_BJR1, -jnp.inf, top_BJR1 / LOG2_E + jnp.log(safe_BJR1))
    return sum_BJRW / safe_BJR1, lse_BJR1[..., 0]


def _kernel(count, order, first_row, *refs, plan: _Plan):
    """One grid step: copies for the next one, then the softmax of each item of its own."""
    (*q_refs, limits_ref), refs = refs[: 2 + plan.integers], refs[2 + plan.integers :]
    arrays = 5 if plan.scaled else 3
    caches, sums, (buffers, arrived) = refs[:arrays], refs[arrays : arrays + 3], refs[arrays + 3 :]
    blocks = plan.blocks
    core, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    slot = lax.rem(step, 2)

    def number(step, i):
        return (core * steps + step) * blocks.items + i

    def for_items(step, all_of_them, one):
        """Straight code for a step of all its items, as most are: loops are slow in scalar code."""
        there = jnp.clip(count[0] - number(step, 0), 0, blocks.items)
        pl.when(there == blocks.items)(all_of_them)
        pl.when(there < blocks.items)(lambda: pl.loop(0, there)(one))

    def start(step):
        slot = lax.rem(step, 2)

        def item(i):
            item = order[number(step, i)]
            rows = pl.ds(first_row[0] + item // plan.held * blocks.rows, blocks.rows)
            at = pl.multiple_of(item % plan.held * blocks.keys, LANES)
            pairs = [(caches[0].at[item], buffers[0].at[slot, i])]
            for ref, buffer in zip(caches[1:], buffers[1:]):
                source, target = ref.at[rows, :, pl.ds(at, blocks.keys)], buffer.at[slot, i]
                if len(ref.shape) == 3:
                    pairs.append((source, target))
                    continue
                for lane in range(0, ref.shape[3], LANES):  # else the copy becomes a loop of copies
                    part = pl.ds(lane, LANES)
                    pairs.append((source.at[..., part], target.at[..., part]))
            for pair in pairs:
                pltpu.make_async_copy(*pair, arrived.at[slot]).start()

        def items():
            for i in range(blocks.items):
                item(i)

        for_items(step, items, item)

    def wait(target):
        # By the bytes of the target: all copies into it at once.
        for buffer in buffers:
            pltpu.make_async_copy(target(buffer), target(buffer), arrived.at[slot]).wait()

    first = jnp.where(step == 0, 0, step + 1)
    pl.loop(first, jnp.minimum(step + 2, steps))(start)
    for_items(step, lambda: wait(lambda b: b.at[slot]), lambda i: wait(lambda b: b.at[slot, i]))

    if not plan.once:

        @pl.when(step == 0)
        def _():
            for ref, value in zip(sums, EMPTY):
                ref[...] = jnp.full(ref.shape, value, ref.dtype)

    def add(live, row, head, new):
        if not plan.once:
            # The buffers of an item that is not there may hold anything, nan too.
            new = [jnp.where(live, x, empty) for x, empty in zip(new, EMPTY)]
            new = _join([[ref[row, head] for ref in sums], new])
        for ref, x in zip(sums, new):
            ref[row, head] = x

    chains = list(product(range(blocks.items), range(blocks.rows), range(plan.heads)))
    at_once = max(WAVE // (plan.size * blocks.keys), 1)
    for first in range(0, len(chains), at_once):
        wave = []
        for i, b, head in chains[first : first + at_once]:
            live = number(step, i) < count[0]
            row = order[jnp.where(live, number(step, i), 0)] // plan.held * blocks.rows + b
            refs = [buffer.at[slot, i, b] for buffer in buffers]
            wave.append((live, row, head, refs))
        news = _softmax_sums(
            [
                ([ref[row, head] for ref in q_refs], limits_ref[row], head, refs)
                for _, row, head, refs in wave
            ],
            plan,
        )
        for (live, row, head, _), new in zip(wave, news):
            add(live, row, head, new)


def _softmax_sums(chains, plan: _Plan) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Per chain: maximum, sum of weights, weighted sum of values; of one matrix of queries each.

    Stage by stage for all of them, as the compiler keeps to this order where it can.
    """
    parts = [(chain, at) for chain in chains for at in range(0, plan.blocks.keys, plan.chunk)]
    scores = [_scores(*chain, at, plan) for chain, at in parts]
    tops = [jnp.maximum(jnp.max(s_RS, axis=1, keepdims=True), LOWEST) for s_RS in scores]
    weights = [jnp.exp2(s_RS - top_R1) for s_RS, top_R1 in zip(scores, tops)]
    totals = [jnp.sum(p_RS, axis=1, keepdims=True) for p_RS in weights]
    sums = [_weigh(p_RS, *chain[2:], at, plan) for p_RS, (chain, at) in zip(weights, parts)]
    each = len(parts) // len(chains)
    triples = list(zip(tops, totals, sums))
    return [_join(triples[n : n + each]) for n in range(0, len(triples), each)]


def _scores(queries, limits_R2, head, refs, at, plan: _Plan) -> jax.Array:
    """Scores as exponents of two, `[rows, keys]`, of the chunk of keys that begins at `at`."""
    pos_ref, k_ref, *_ = refs
    chunk, spec = pl.ds(at, plan.chunk), plan.spec
    s_RS = _product(queries, _side_by_side(k_ref, head, chunk, plan), 1, plan)
    # float32 from here on: to scale the queries would round them again.
    factor = spec.scale * LOG2_E if spec.soft_cap is None else spec.scale / spec.soft_cap
    s_RS = s_RS * (refs[3][head : head + 1, chunk] * factor if plan.scaled else factor)
    if spec.soft_cap is not None:
        s_RS = spec.soft_cap * LOG2_E * jnp.tanh(s_RS)
    pos_1S = pos_ref[:, chunk]
    seen_RS = (pos_1S >= limits_R2[:, :1]) & (pos_1S < limits_R2[:, 1:])
    return jnp.where(seen_RS, s_RS, MASKED)


def _weigh(p_RS, head, refs, at, plan: _Plan) -> jax.Array:
    v_ref, chunk = refs[2], pl.ds(at, plan.chunk)
    if plan.scaled:
        p_RS = p_RS * refs[4][head : head + 1, chunk]
    return _product(_left(p_RS, plan), _side_by_side(v_ref, head, chunk, plan), 0, plan)


def _side_by_side(ref, head, chunk, plan: _Plan) -> jax.Array:
    """Keys or values of the key heads that share matrix `head` of queries, `[keys, W]`."""
    parts = [ref[head * plan.fold + f, chunk] for f in range(plan.fold)]
    return jnp.concatenate(parts, axis=1).astype(plan.kv_dtype)


def _left(x: jax.Array, plan: _Plan) -> list[jax.Array]:
    """Queries or weights, `[..., R, n]`, as `_product` takes them."""
    return _digits(x) if plan.integers else [x.astype(plan.dtype)]


def _digits(x: jax.Array) -> list[jax.Array]:
    """`x` in units of its row, each number in two digits: int8 `[..., 2R, n]`, high digits of all
    rows before the low ones, and the float32 units `[..., R, 1]`. Off by half a unit at most, of
    which the largest number of a row has 127 * BASE."""
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.maximum(most, jnp.finfo(jnp.float32).tiny * BASE**2) / (127 * BASE)
    number = jnp.round(x / unit).astype(jnp.int32)
    high = (number + BASE // 2) // BASE
    digits = jnp.concatenate([high, number - high * BASE], axis=-2)
    return [digits.astype(jnp.int8), unit]


def _product(left: list, right: jax.Array, axis: int, plan: _Plan) -> jax.Array:
    """`[R, ...]` in float32: sums over the last axis of `left` and `axis` of `right`."""
    # Named in all cases: a process may have set another default, which only float32 has.
    precision = lax.Precision.HIGHEST if plan.dtype == jnp.float32 else lax.Precision.DEFAULT
    product = lax.dot_general(
        left[0], right, (((1,), (axis,)), ((), ())), precision=precision,
        preferred_element_type=jnp.int32 if plan.integers else jnp.float32,
    )  # fmt: skip
    if not plan.integers:
        return product
    high, low = jnp.split(product, 2)
    return (high * BASE + low).astype(jnp.float32) * left[1]


def _join(sums: list) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax sums over several sets of keys as those over all of them."""
    if len(sums) == 1:
        return sums[0]
    top_R1 = reduce(jnp.maximum, [top for top, *_ in sums])
    keep = [jnp.exp2(top - top_R1) for top, *_ in sums]
    total_R1 = sum(total * k for (_, total, _), k in zip(sums, keep))
    return top_R1, total_R1, sum(value * k for (_, _, value), k in zip(sums, keep))
