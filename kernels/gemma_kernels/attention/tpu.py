"""Attention on TPU as a Pallas kernel: for training and prefill, forward.

A grid step takes a tile of queries of one key/value head (or of several) and a few key blocks. All
query heads of a group are rows of one matrix. Two ways through the keys:

    a window is promised   the key blocks that a tile of queries can see are a fixed few, all of
                           them in VMEM at once: one softmax, nothing rescaled, and for tiles
                           whose mask is the plain causal window, comparisons known at compile time
    anything else          key blocks come one after the other under a running softmax, from the
                           first that some query of the tile sees to the last; blocks that all of
                           them see whole are not masked

The mask needs no array of more than one dimension on the way: bounds of tiles and blocks are
computed on the device from the intervals (`_bounds`), and lie in scalar memory.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.attention.xla import attention_xla

LANES = 128
ROWS = 256  # rows of one matrix product: a piece of a tile of queries
MASKED = -1e30
LOWEST = -1e29  # of a row's maximum: a row that sees nothing gets weights 0, not 1
LOG2_E = math.log2(math.e)
VMEM_LIMIT = 96 * 2**20


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles.

    Attributes:
      q, k: Queries (per head) of a tile, keys of a block; multiples of 128.
      heads: Key/value heads of a grid step.
    """

    q: int = 256
    k: int = 256
    heads: int = 1


@dataclass(frozen=True)
class _Plan:
    """What the kernel knows at compile time.

    Attributes:
      resident: Key blocks of a grid step.
      steps: Grid steps along the keys.
      first: With a window, the first key block of tile 0 (may lie before the keys).
      window: The promised window, or `None`.
      offset: Key row of the first query, with a window.
    """

    blocks: Blocks
    groups: int
    width: int
    resident: int
    steps: int
    first: int
    window: int | None
    offset: int
    spec: AttentionSpec
    dtype: jnp.dtype

    @property
    def rows(self) -> int:
        return self.groups * self.blocks.q

    @property
    def piece(self) -> int:
        return math.gcd(self.blocks.q, ROWS)


def attention_tpu(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    *,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Same result as `reference.attention_reference`, `[B, T, N, H]` in the queries' dtype.

    Its gradient is that of `attention_xla`.

    Args:
      blocks: Sizes of tiles; default: by shape.
      interpret: Run without a TPU, by Pallas' interpreter.

    Raises:
      NotImplementedError: A call that this kernel does not serve; says why.
      ValueError: Sizes of tiles that do not fit.
    """
    if not spec.softmax_in_float32:
        raise NotImplementedError("its softmax is in float32 only")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries are {q_BTNH.dtype}; it takes bfloat16 and float32")
    blocks = blocks or default_blocks(q_BTNH.shape, k_BSKH.shape, spec)
    _check_blocks(blocks, k_BSKH.shape[2], spec)
    return _attention(
        q_BTNH, k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype),
        lo_BT, hi_BT, kv_pos_BS, spec, blocks, interpret,
    )  # fmt: skip


def default_blocks(q_shape: tuple, k_shape: tuple, spec: AttentionSpec) -> Blocks:
    """Tiles that fill the matrix unit without computing much beyond the window."""
    T, groups = q_shape[1], q_shape[2] // k_shape[2]
    whole = pl.cdiv(T, LANES) * LANES
    if spec.window is None:
        return Blocks(q=min(whole, 512), k=min(pl.cdiv(k_shape[1], LANES) * LANES, 1024))
    heads = max(n for n in (1, 2, 4) if k_shape[2] % n == 0 and n * groups <= max(groups, 4))
    return Blocks(q=min(whole, 512), k=min(whole, 256), heads=heads)


def _check_blocks(blocks: Blocks, K: int, spec: AttentionSpec) -> None:
    if blocks.q % LANES or blocks.k % LANES or min(blocks.q, blocks.k) < LANES:
        raise ValueError(f"tiles must be multiples of {LANES}, got q={blocks.q}, k={blocks.k}")
    if spec.window is not None and blocks.q % blocks.k:
        raise ValueError(f"with a window, q={blocks.q} must be a multiple of k={blocks.k}")
    if K % blocks.heads:
        raise ValueError(f"heads={blocks.heads} must divide the {K} key/value heads")


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, blocks, interpret):
    return _forward(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, blocks, interpret)


def _attention_fwd(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, blocks, interpret):
    operands = (q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS)
    return _forward(*operands, spec, blocks, interpret), operands


def _attention_bwd(spec, blocks, interpret, operands, gradient_BTNH):
    *qkv, lo_BT, hi_BT, kv_pos_BS = operands
    _, pull = jax.vjp(lambda q, k, v: attention_xla(q, k, v, lo_BT, hi_BT, kv_pos_BS, spec), *qkv)
    return *pull(gradient_BTNH), None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, blocks, interpret):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    plan = _plan(q_BTNH, S, K, spec, blocks)
    tiles, key_blocks = pl.cdiv(T, blocks.q), pl.cdiv(S, blocks.k)
    # Queries without a key, and keys that nobody sees, up to whole tiles.
    lo_BT, hi_BT = (_pad(x, 1, tiles * blocks.q) for x in (lo_BT, hi_BT))
    kv_pos_BS = _pad(kv_pos_BS, 1, key_blocks * blocks.k, -1)
    first, last, plain_first, plain_last = _bounds(lo_BT, hi_BT, kv_pos_BS, plan)

    # Heads first: the layout is the compiler's to choose, so this is no copy by itself.
    q_BKGTH = jnp.moveaxis(_pad(q_BTNH, 3, plan.width).reshape(B, T, K, N // K, plan.width), 1, 3)
    k_BKSH, v_BKSH = (
        jnp.moveaxis(_pad(_pad(x, 3, plan.width), 1, key_blocks * blocks.k), 1, 2)
        for x in (k_BSKH, v_BSKH)
    )

    def key_block(b, h, i, j, first, last, *_, r):
        block = first[b * tiles + i] + j * plan.resident + r
        return b, h, jnp.clip(block, 0, jnp.maximum(last[b * tiles + i], 0)), 0

    def queries(b, h, i, j, *_):
        return b, h, 0, i, 0

    def whole_row(b, h, i, j, *_):
        return b, 0, 0

    q_spec = pl.BlockSpec((None, blocks.heads, N // K, blocks.q, plan.width), queries)
    kv_specs = [
        pl.BlockSpec((None, blocks.heads, blocks.k, plan.width), partial(key_block, r=r))
        for r in range(plan.resident)
    ]
    t_spec = pl.BlockSpec((None, 1, tiles * blocks.q), whole_row)
    s_spec = pl.BlockSpec((None, 1, key_blocks * blocks.k), whole_row)
    running = [(1,), (1,), (plan.width,)] if plan.steps > 1 else []
    out_BKGTH = pl.pallas_call(
        partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, K // blocks.heads, tiles, plan.steps),
            in_specs=[t_spec, t_spec, s_spec, q_spec, *kv_specs, *kv_specs],
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM((blocks.heads, plan.rows, *shape), jnp.float32) for shape in running
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BKGTH.shape, q_BKGTH.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
        name="local_attention" if plan.window else "global_attention",
    )(
        first, last, plain_first, plain_last,
        lo_BT[:, None], hi_BT[:, None], kv_pos_BS[:, None],
        q_BKGTH, *[k_BKSH] * plan.resident, *[v_BKSH] * plan.resident,
    )  # fmt: skip
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, plan.width)[..., :H]


def _plan(q_BTNH, S: int, K: int, spec: AttentionSpec, blocks: Blocks) -> _Plan:
    _, T, N, H = q_BTNH.shape
    if spec.window is None:
        first, resident, steps = 0, 1, pl.cdiv(S, blocks.k)
    else:
        offset = S - T
        first = (offset - spec.window + 1) // blocks.k
        resident, steps = (offset + blocks.q - 1) // blocks.k - first + 1, 1
    return _Plan(
        blocks=blocks,
        groups=N // K,
        width=pl.cdiv(H, LANES) * LANES,
        resident=resident,
        steps=steps,
        first=first,
        window=spec.window,
        offset=S - T,
        spec=spec,
        dtype=q_BTNH.dtype,
    )


def _bounds(lo_BT, hi_BT, kv_pos_BS, plan: _Plan) -> tuple[jax.Array, ...]:
    """Per tile of queries, flat `[B * tiles]`: first and last key block, and those seen whole.

    With a window, "seen whole" is one flag: 1 if the mask is the plain causal window.
    """
    blocks = plan.blocks
    B = len(lo_BT)
    lo_BiQ, hi_BiQ = (x.reshape(B, -1, blocks.q) for x in (lo_BT, hi_BT))
    pos_BjK = kv_pos_BS.reshape(B, -1, blocks.k)
    tiles, key_blocks = lo_BiQ.shape[1], pos_BjK.shape[1]
    if plan.window is not None:
        first = plan.first + jnp.arange(tiles) * (blocks.q // blocks.k)
        first_Bi = jnp.broadcast_to(first.astype(jnp.int32), (B, tiles))
        plain_Bi = _plain_windows(lo_BT, hi_BT, kv_pos_BS, plan)
        ends = jnp.full_like(first_Bi, key_blocks - 1)
        return tuple(x.reshape(-1) for x in (first_Bi, ends, plain_Bi, plain_Bi))

    far = jnp.iinfo(jnp.int32).max
    some_BiQ = hi_BiQ > lo_BiQ
    lo_Bi1 = jnp.min(jnp.where(some_BiQ, lo_BiQ, far), 2)[:, :, None]
    hi_Bi1 = jnp.max(jnp.where(some_BiQ, hi_BiQ, -1), 2)[:, :, None]
    inner_lo_Bi1 = jnp.max(jnp.where(some_BiQ, lo_BiQ, -1), 2)[:, :, None]
    inner_hi_Bi1 = jnp.min(jnp.where(some_BiQ, hi_BiQ, far), 2)[:, :, None]
    least_B1j = jnp.min(pos_BjK, 2)[:, None]
    least_real_B1j = jnp.min(jnp.where(pos_BjK >= 0, pos_BjK, far), 2)[:, None]
    most_B1j = jnp.max(pos_BjK, 2)[:, None]
    live_Bij = (most_B1j >= lo_Bi1) & (least_real_B1j < hi_Bi1) & (most_B1j >= 0)
    plain_Bij = (least_B1j >= inner_lo_Bi1) & (most_B1j < inner_hi_Bi1) & (least_B1j >= 0)
    first_Bi, last_Bi = _range(live_Bij)
    plain_first_Bi, plain_last_Bi = _range(plain_Bij)
    contiguous_Bi = jnp.sum(plain_Bij, 2) == plain_last_Bi - plain_first_Bi + 1
    plain_last_Bi = jnp.where(contiguous_Bi, plain_last_Bi, -1)
    return tuple(x.reshape(-1) for x in (first_Bi, last_Bi, plain_first_Bi, plain_last_Bi))


def _range(flags_Bij: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 first and last index of True along the last axis; 0 and -1 if there is none."""
    some_Bi = jnp.any(flags_Bij, 2)
    last_Bi = flags_Bij.shape[2] - 1 - jnp.argmax(flags_Bij[:, :, ::-1], 2)
    first_Bi = jnp.where(some_Bi, jnp.argmax(flags_Bij, 2), 0)
    return first_Bi.astype(jnp.int32), jnp.where(some_Bi, last_Bi, -1).astype(jnp.int32)


def _plain_windows(lo_BT, hi_BT, kv_pos_BS, plan: _Plan) -> jax.Array:
    """1 for tiles whose queries see exactly the `window` rows up to their own; int32 `[B, tiles]`.

    Then rows can be compared instead of positions, which are known at compile time.
    """
    T, S = lo_BT.shape[1], kv_pos_BS.shape[1]
    row_T = plan.offset + jnp.arange(T)
    own_BT = jnp.take(kv_pos_BS, row_T, axis=1, mode="clip")
    oldest_BT = jnp.take(kv_pos_BS, row_T - plan.window + 1, axis=1, mode="clip")
    plain_BT = (lo_BT == oldest_BT) & (hi_BT == own_BT + 1) & (oldest_BT >= 0)
    plain_BT &= (row_T - plan.window + 1 >= 0) & (row_T < S)
    # No key out of order may hide between the oldest and the own one.
    ascending_BS = jnp.pad(kv_pos_BS[:, 1:] > kv_pos_BS[:, :-1], ((0, 0), (1, 0)))
    breaks_BS = jnp.cumsum(~ascending_BS, axis=1)
    breaks_BT = [
        jnp.take(breaks_BS, rows, axis=1, mode="clip") for rows in (row_T, row_T - plan.window + 1)
    ]
    plain_BT &= breaks_BT[0] == breaks_BT[1]
    return jnp.all(plain_BT.reshape(len(lo_BT), -1, plan.blocks.q), 2).astype(jnp.int32)


def _kernel(first, last, plain_first, plain_last, lo_ref, hi_ref, pos_ref, q_ref, *refs, plan):
    """One grid step; see `_forward` for the operands."""
    k_refs, v_refs = refs[: plan.resident], refs[plan.resident : 2 * plan.resident]
    out_ref, *running = refs[2 * plan.resident :]
    step, first_query = pl.program_id(3), pl.program_id(2) * plan.blocks.q
    tile = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    block = first[tile] + step * plan.resident

    def positions(r: int) -> jax.Array:
        at = jnp.clip(block + r, 0, last[tile]) * plan.blocks.k
        pos_1S = pos_ref[:, pl.ds(pl.multiple_of(at, LANES), plan.blocks.k)]
        return jnp.where((block + r >= 0) & (block + r <= last[tile]), pos_1S, -1)

    def interval(t: int) -> tuple[jax.Array, jax.Array]:
        at = pl.ds(pl.multiple_of(first_query + t, LANES), plan.piece)
        return _column(lo_ref[:, at]), _column(hi_ref[:, at])

    def attend(kind: str) -> None:
        for head in range(plan.blocks.heads):
            for row in range(0, plan.rows, plan.piece):
                mask = (kind, interval, positions)
                _piece(head, row, mask, q_ref, k_refs, v_refs, out_ref, running, plan)

    if plan.window is not None:
        pl.when(plain_first[tile] == 1)(lambda: attend("window"))
        pl.when(plain_first[tile] == 0)(lambda: attend("positions"))
        return

    @pl.when(step == 0)
    def _():
        for ref, value in zip(running, (LOWEST, 0.0, 0.0)):
            ref[...] = jnp.full(ref.shape, value, ref.dtype)

    plain = (block >= plain_first[tile]) & (block <= plain_last[tile])
    live = (block <= last[tile]) | (step == 0)  # a tile that sees nothing still writes zeros
    pl.when(live & plain)(lambda: attend("all"))
    pl.when(live & ~plain)(lambda: attend("positions"))

    if running:

        @pl.when(step == plan.steps - 1)
        def _():
            for head in range(plan.blocks.heads):
                for row in range(0, plan.rows, plan.piece):
                    group, t = divmod(row, plan.blocks.q)
                    at = pl.ds(row, plan.piece)
                    out_RH = running[2][head, at] * _inverse(running[1][head, at], interval(t))
                    out_ref[head, group, t : t + plan.piece] = out_RH.astype(plan.dtype)


def _piece(head, row, mask, q_ref, k_refs, v_refs, out_ref, running, plan: _Plan) -> None:
    """Some rows of a tile of queries against the resident key blocks."""
    size, spec = plan.piece, plan.spec
    kind, interval, positions = mask
    # Named in both cases: a process may have set another default, which bfloat16 does not have.
    precision = lax.Precision.HIGHEST if plan.dtype == jnp.float32 else lax.Precision.DEFAULT
    exact = dict(preferred_element_type=jnp.float32, precision=precision)
    group, t = divmod(row, plan.blocks.q)
    # Scaled so that scores are exponents of two, or fractions of the cap.
    factor = spec.scale * LOG2_E if spec.soft_cap is None else spec.scale / spec.soft_cap
    q_RH = (q_ref[head, group, t : t + size].astype(jnp.float32) * factor).astype(plan.dtype)

    def scores(r: int) -> jax.Array:
        s_RS = lax.dot_general(q_RH, k_refs[r][head], (((1,), (1,)), ((), ())), **exact)
        if spec.soft_cap is not None:
            s_RS = spec.soft_cap * LOG2_E * jnp.tanh(s_RS)
        seen_RS = None
        if kind == "window":
            seen_RS = _window_mask(r, t, size, plan)
        elif kind == "positions":
            pos_1S, (lo_R1, hi_R1) = positions(r), interval(t)
            seen_RS = (pos_1S >= jnp.maximum(lo_R1, 0)) & (pos_1S < hi_R1)
        return s_RS if seen_RS is None else jnp.where(seen_RS, s_RS, MASKED)

    visible = [r for r in range(plan.resident) if _reaches(r, t, size, plan)]
    s = [scores(r) for r in visible]
    top_R1 = reduce(jnp.maximum, [jnp.max(s_RS, axis=1, keepdims=True) for s_RS in s])
    if running:
        at = pl.ds(row, size)
        top_ref, total_ref, sum_ref = (ref.at[head, at] for ref in running)
        old_R1 = top_ref[...]
        top_R1 = jnp.maximum(top_R1, old_R1)
    elif kind == "positions":
        top_R1 = jnp.maximum(top_R1, LOWEST)
    p = [jnp.exp2(s_RS - top_R1) for s_RS in s]
    total_R1 = sum(jnp.sum(p_RS, axis=1, keepdims=True) for p_RS in p)
    sum_RH = sum(
        lax.dot_general(p_RS.astype(plan.dtype), v_refs[r][head], (((1,), (0,)), ((), ())), **exact)
        for r, p_RS in zip(visible, p)
    )
    if running:
        keep_R1 = jnp.exp2(old_R1 - top_R1)
        top_ref[...] = top_R1
        total_ref[...] = total_ref[...] * keep_R1 + total_R1
        sum_ref[...] = sum_ref[...] * keep_R1 + sum_RH
    else:
        sees = None if kind == "window" else interval(t)
        out_ref[head, group, t : t + size] = (sum_RH * _inverse(total_R1, sees)).astype(plan.dtype)


def _ahead(r: int, t: int, plan: _Plan) -> int:
    """First key of resident block `r` minus row `t` of any tile of queries, both as key rows."""
    return (plan.first + r) * plan.blocks.k - plan.offset - t


def _reaches(r: int, t: int, size: int, plan: _Plan) -> bool:
    """Whether the promised window lets rows `[t, t + size)` see anything of resident block `r`."""
    ahead = _ahead(r, t, plan)
    return plan.window is None or -plan.window - plan.blocks.k + 1 < ahead < size


def _window_mask(r: int, t: int, size: int, plan: _Plan) -> jax.Array | None:
    """Which keys of resident block `r` the rows `[t, t + size)` of a tile see, by row numbers."""
    ahead = _ahead(r, t, plan)
    shape = (size, plan.blocks.k)
    delta_RS = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
    seen_RS = None
    if ahead - (size - 1) <= -plan.window:
        seen_RS = delta_RS > -plan.window - ahead
    if ahead + plan.blocks.k - 1 > 0:
        before_RS = delta_RS <= -ahead
        seen_RS = before_RS if seen_RS is None else seen_RS & before_RS
    return seen_RS


def _column(x_1R: jax.Array) -> jax.Array:
    """`[1, R]` as `[R, 1]`: along rows instead of lanes."""
    return jnp.broadcast_to(x_1R, (LANES, x_1R.shape[1])).T[:, :1]


def _inverse(total_R1: jax.Array, interval: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """`1 / total`, and 0 for rows that see nothing; `None` if every row sees something."""
    if interval is None:
        return 1.0 / total_R1
    # Rows with an empty interval do have a total, from blocks that all others see whole.
    some_R1 = (total_R1 > 0) & (interval[1] > interval[0])
    return jnp.where(some_R1, 1.0 / jnp.where(some_R1, total_R1, 1.0), 0.0)


def _pad(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n) if i == axis else (0, 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)
