r"""The forward kernels of attention on TPU: one for windows, one for everything else.

A tile holds `q` queries of every head of a group, for one key/value head. Its softmax runs over
pieces: `piece` queries, their `G` heads as rows of one matrix.

    window      grid (B, K, tiles)              the keys of a tile at once, one piece after another
                                    ----- span -----
                  piece 0   [/ / / . . . . \ \]                   /  before the window of some
                  piece 1       [/ / / . . . . \ \]               \  after some query
                  piece 2           [/ / / . . . . \ \]           .  seen by all: no mask at all
                A piece's softmax is computed in one go, and which columns need a mask is known at
                compile time, unless its mask is not the plain window (less text before it than the
                window is long, padding, packed documents).
    running     grid (B, K, tiles, fetches)     keys come block by block
                Each step fetches `fetch` blocks of `k` keys and loops over those that the tile
                meets (see `tiles.py`; the bounds lie in scalar memory) under a running softmax;
                blocks seen whole are not masked.

Keys arrive transposed, `[H, keys]`, as the matrix unit wants its second operand: to transpose them
here would cost as much time of the cross-lane unit as a product with them takes. Heads come before
tokens. Both are layouts that XLA gives to what computes queries and keys (or a copy, if nothing
does), as is the factor on the queries.

VMEM per element of H, in bytes of bfloat16: keys and values twice (the next step's arrive during
this one), `8 x span` or `8 x fetch x k`; queries and results twice, `8 x G x q`; running sums in
float32, `4 x G x q`. Beside those the scores of a piece, `6 x G x piece x span` (or `k`) bytes.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.attention import tiles
from gemma_kernels.attention.spec import AttentionSpec

LANES = 128
MASKED = -1e30
LOWEST = -1e29  # of a row's maximum: a row that sees nothing gets weights 0, not 1
LOG2_E = math.log2(math.e)
VMEM_LIMIT = 48 * 2**20


@dataclass(frozen=True)
class Blocks:
    """Sizes of tiles; those that count queries or keys are multiples of 128.

    Attributes:
      q: Queries (per head) of a tile.
      k: Keys of a block of the running softmax.
      piece: Queries whose scores are computed together; divides `q`.
      fetch: Blocks of keys that a grid step loads.
    """

    q: int = 512
    k: int = 512
    piece: int = 256
    fetch: int = 4


@dataclass(frozen=True)
class Plan:
    """What the kernels know at compile time.

    Attributes:
      groups: Query heads per key/value head.
      width: Head width, padded to whole lanes.
      offset: Key row of the first query.
      keys: Rows of keys; more are padding.
      span: Keys of a tile under a window; `None` for the running softmax.
      stated: The spec states the mask; there are no intervals.
      with_lse: Whether the log-sum-exp is wanted.
    """

    blocks: Blocks
    spec: AttentionSpec
    dtype: jnp.dtype
    groups: int
    width: int
    offset: int
    keys: int
    span: int | None
    stated: bool
    with_lse: bool

    @property
    def before(self) -> int:
        """Keys of a span before the own key of the tile's first query.

        The window's, and as many more as make the span begin at a multiple of 128.
        """
        return self.offset - (self.offset + 1 - self.spec.window) // LANES * LANES

    @property
    def reach(self) -> int:
        """Keys of a piece under a window."""
        return _up(self.before + self.blocks.piece, LANES)

    @property
    def vmem_bytes(self) -> int:
        """The docstring's sum; a bound on what the compiler needs, which reuses space of scores."""
        blocks, width = self.blocks, self.width
        fetched, keys = self.span, self.span and self.reach
        running = 0
        if self.span is None:
            fetched, keys = blocks.k * blocks.fetch, blocks.k
            running = 4 * (width + 2 * LANES) * self.groups * blocks.q
        copies = 4 * jnp.dtype(self.dtype).itemsize * width * (fetched + self.groups * blocks.q)
        return copies + running + 6 * self.groups * blocks.piece * keys


def make_plan(
    q_BTNH, k_BSKH, stated: bool, spec: AttentionSpec, blocks: Blocks, with_lse: bool = False
) -> Plan:
    T, N, H = q_BTNH.shape[1:]
    S, K = k_BSKH.shape[1:3]
    plan = Plan(
        blocks=blocks,
        spec=spec,
        dtype=q_BTNH.dtype,
        groups=N // K,
        width=_up(H, LANES),
        offset=S - T,
        keys=S,
        span=None,
        stated=stated,
        with_lse=with_lse,
    )
    if spec.window is None:
        return plan
    at_once = replace(plan, span=plan.reach + blocks.q - blocks.piece)
    # No gain where a span is all there is; and scores of a whole window may be too many.
    return at_once if at_once.span < S and at_once.vmem_bytes <= VMEM_LIMIT else plan


def attention_forward_tpu(
    q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, *, blocks, with_lse, interpret=False
) -> tuple[jax.Array, jax.Array | None]:
    """`out_BTNH` and, if wanted, `lse_BTN`; the mask operands are `None` if the spec states it."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    plan = make_plan(q_BTNH, k_BSKH, lo_BT is None, spec, blocks, with_lse)
    count = pl.cdiv(T, blocks.q)
    if plan.span is None:
        keys = _up(S, blocks.k * blocks.fetch)
    else:
        keys = _up(plan.offset + count * blocks.q, LANES)

    # Scores come out as exponents of two, or as fractions of the cap. Fuses with what makes q.
    factor = spec.scale * LOG2_E if spec.soft_cap is None else spec.scale / spec.soft_cap
    q_BTNH = (q_BTNH.astype(jnp.float32) * factor).astype(plan.dtype)
    # Heads first: the layout is the compiler's to choose, so this is no copy by itself.
    q_BTNH = _pad(_pad(q_BTNH, 3, plan.width), 1, count * blocks.q)
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(B, -1, K, N // K, plan.width), 1, 3)
    k_BSKH, v_BSKH = (_pad(_pad(x, 3, plan.width), 1, keys) for x in (k_BSKH, v_BSKH))
    k_BKHS, v_BKSH = jnp.moveaxis(k_BSKH, 1, 3), jnp.moveaxis(v_BSKH, 1, 2)
    mask = ()
    if not plan.stated:
        # Padding queries see what the last one sees, and keep no block from being seen whole.
        lo_BT, hi_BT = (_pad(x, 1, count * blocks.q, mode="edge") for x in (lo_BT, hi_BT))
        kv_pos_BS = _pad(kv_pos_BS, 1, keys, constant_values=-1)
        mask = (lo_BT[:, None], hi_BT[:, None], kv_pos_BS[:, None])
    call = _running_call if plan.span is None else _window_call
    out_BKGTH, *lse_BKGT = call(plan, mask, q_BKGTH, k_BKHS, v_BKSH, interpret)
    out_BTNH = jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, -1, N, plan.width)[:, :T, :, :H]
    if not with_lse:
        return out_BTNH, None
    return out_BTNH, jnp.moveaxis(lse_BKGT[0], 3, 1).reshape(B, -1, N)[:, :T]


def _window_call(plan, mask, q_BKGTH, k_BKHS, v_BKSH, interpret):
    blocks, H = plan.blocks, plan.width
    B, K, _, rows, _ = q_BKGTH.shape
    if plan.stated:
        # The first tiles, whose windows would begin before the text, are not plain.
        first_i = plan.offset + jnp.arange(0, rows, blocks.q, dtype=jnp.int32)
        plain_Bi = (first_i >= plan.spec.window - 1)[None].astype(jnp.int32)
    else:
        rows_of_mask = (x[:, 0] for x in mask)
        plain_Bi = tiles.plain_windows(*rows_of_mask, blocks.q, plan.offset, plan.spec.window)

    def keys_of(b, h, i, plain):
        return b, h, 0, _first_key(i, plan)

    def values_of(b, h, i, plain):
        return b, h, _first_key(i, plan), 0

    def positions_of(b, h, i, plain):
        return b, 0, _first_key(i, plan)

    one = pl.squeezed
    return _call(
        partial(_window_kernel, plan=plan),
        plan,
        grid=(B, K, rows // blocks.q),
        scalars=[plain_Bi.reshape(-1)],
        mask=mask,
        positions_spec=pl.BlockSpec((one, pl.Element(1), pl.Element(plan.span)), positions_of),
        k_spec=pl.BlockSpec((one, one, pl.Element(H), pl.Element(plan.span)), keys_of),
        v_spec=pl.BlockSpec((one, one, pl.Element(plan.span), pl.Element(H)), values_of),
        qkv=(q_BKGTH, k_BKHS, v_BKSH),
        interpret=interpret,
    )


def _running_call(plan, mask, q_BKGTH, k_BKHS, v_BKSH, interpret):
    blocks, H = plan.blocks, plan.width
    B, K, _, rows, _ = q_BKGTH.shape
    count, fetched = rows // blocks.q, blocks.fetch * blocks.k
    if plan.stated:
        causal, window = plan.spec.causal, plan.spec.window
        meetings = tiles.static_meetings(
            plan.keys - plan.offset, plan.keys, blocks.q, blocks.k, causal, window
        )
        some_Bij, whole_Bij = (jnp.asarray(x)[None] for x in meetings)
    else:
        some_Bij, whole_Bij = tiles.meetings(*(x[:, 0] for x in mask), blocks.q, blocks.k)

    def fetch_of(b, i, j, first, last):
        tile = _at(b, i, count, plan)
        step = first[tile] // blocks.fetch + j
        return jnp.minimum(step, jnp.maximum(last[tile], 0) // blocks.fetch)

    def keys_of(b, h, i, j, first, last, *_):
        return b, h, 0, fetch_of(b, i, j, first, last)

    def values_of(b, h, i, j, first, last, *_):
        return b, h, fetch_of(b, i, j, first, last), 0

    def positions_of(b, h, i, j, first, last, *_):
        return b, 0, fetch_of(b, i, j, first, last)

    pieces = blocks.q // blocks.piece, plan.groups * blocks.piece
    return _call(
        partial(_running_kernel, plan=plan),
        plan,
        grid=(B, K, count, k_BKHS.shape[3] // fetched),
        scalars=[x.reshape(-1) for x in tiles.bounds(some_Bij, whole_Bij)],
        mask=mask,
        positions_spec=pl.BlockSpec((None, 1, fetched), positions_of),
        k_spec=pl.BlockSpec((None, None, H, fetched), keys_of),
        v_spec=pl.BlockSpec((None, None, fetched, H), values_of),
        qkv=(q_BKGTH, k_BKHS, v_BKSH),
        interpret=interpret,
        scratch=[pltpu.VMEM((*pieces, lanes), jnp.float32) for lanes in (LANES, LANES, H)],
    )


def _call(
    kernel, plan, *, grid, scalars, mask, positions_spec, k_spec, v_spec, qkv, interpret, scratch=()
):
    q_BKGTH, blocks = qkv[0], plan.blocks
    t_spec = pl.BlockSpec((None, 1, blocks.q), lambda b, h, i, *_: (b, 0, i))
    mask_specs = [] if plan.stated else [t_spec, t_spec, positions_spec]
    q_spec = pl.BlockSpec(
        (None, None, plan.groups, blocks.q, plan.width), lambda b, h, i, *_: (b, h, 0, i, 0)
    )
    lse_spec = pl.BlockSpec((None, None, plan.groups, blocks.q), lambda b, h, i, *_: (b, h, 0, i))
    results = [(q_spec, q_BKGTH.shape, plan.dtype), (lse_spec, q_BKGTH.shape[:4], jnp.float32)]
    results = results if plan.with_lse else results[:1]
    # Inside shard_map, results vary over the mesh axes that queries vary over.
    varying = jax.typeof(q_BKGTH).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[*mask_specs, q_spec, k_spec, v_spec],
            out_specs=[spec for spec, _, _ in results],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(*facts, manual_axis_type=varying) for _, *facts in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
        name="local_attention" if plan.span else "global_attention",
    )(*scalars, *mask, *qkv)


def _window_kernel(plain, *refs, plan: Plan):
    """One tile with all of its keys."""
    mask_refs, (q_ref, k_ref, v_ref), results, _ = _unpack(refs, plan)
    i, blocks = pl.program_id(2), plan.blocks
    # How far the keys at hand lie behind the regular ones: where those would begin before row 0.
    shift = _first_key(i, plan) - (plan.offset + i * blocks.q - plan.before)

    def attend(kind):
        def keys_of(t):
            if kind == "window":
                return pl.ds(t, plan.reach), -plan.before
            start = pl.multiple_of(jnp.clip(t - shift, 0, plan.span - plan.reach), LANES)
            return pl.ds(start, plan.reach), start + shift - plan.before - t

        def scores(t):
            at, ahead = keys_of(t)
            s_RS = _scores(q_ref, t, k_ref[:, at], plan)
            return _mask(s_RS, kind, ahead, t, at, mask_refs, plan)

        for t, s_RS in _ahead_of_use(scores, range(0, blocks.q, blocks.piece)):
            top_R1 = jnp.max(s_RS, axis=1, keepdims=True)
            if kind == "positions":
                top_R1 = jnp.maximum(top_R1, LOWEST)
            p_RS = jnp.exp2(s_RS - top_R1)
            total_R1 = jnp.sum(p_RS, axis=1, keepdims=True)
            sum_RH = _product(p_RS.astype(plan.dtype), v_ref[keys_of(t)[0]], plan)
            _write(results, t, _in_lanes(top_R1), _in_lanes(total_R1), sum_RH, plan)

    is_plain = plain[_at(pl.program_id(0), i, pl.num_programs(2), plan)] == 1
    pl.when(is_plain)(lambda: attend("window"))
    pl.when(~is_plain)(lambda: attend("rows" if plan.stated else "positions"))


def _running_kernel(first, last, whole_first, whole_last, *refs, plan: Plan):
    """One tile with some of its keys."""
    mask_refs, (q_ref, k_ref, v_ref), results, running = _unpack(refs, plan)
    top_ref, total_ref, sum_ref = running
    blocks, i, step = plan.blocks, pl.program_id(2), pl.program_id(3)
    tile = _at(pl.program_id(0), i, pl.num_programs(2), plan)
    fetched = (first[tile] // blocks.fetch + step) * blocks.fetch  # the first block at hand
    pieces = range(0, blocks.q, blocks.piece)

    def block(number, _):
        at = pl.ds(pl.multiple_of((number - fetched) * blocks.k, LANES), blocks.k)

        def attend(kind):
            def scores(t):
                end = plan.keys if kind == "tail" else plan.offset + i * blocks.q + t
                s_RS = _scores(q_ref, t, k_ref[:, at], plan)
                return _mask(s_RS, kind, number * blocks.k - end, t, at, mask_refs, plan)

            for t, s_RS in _ahead_of_use(scores, pieces):
                n = t // blocks.piece
                old_RL = top_ref[n]
                top_RL = jnp.maximum(old_RL, jnp.max(s_RS, axis=1, keepdims=True))
                keep_RL = jnp.exp2(old_RL - top_RL)
                p_RS = jnp.exp2(s_RS - _wide(top_RL, blocks.k))
                top_ref[n] = top_RL
                total_ref[n] = total_ref[n] * keep_RL + jnp.sum(p_RS, axis=1, keepdims=True)
                sum_RH = _product(p_RS.astype(plan.dtype), v_ref[at], plan)
                sum_ref[n] = sum_ref[n] * _wide(keep_RL, plan.width) + sum_RH

        is_whole = (number >= whole_first[tile]) & (number <= whole_last[tile])
        pl.when(is_whole)(lambda: attend("all"))
        if plan.spec.masked or plan.keys % blocks.k:
            by = "positions" if not plan.stated else "rows" if plan.spec.causal else "tail"
            pl.when(~is_whole)(lambda: attend(by))

    @pl.when(step == 0)
    def _():
        for ref, value in zip(running, (LOWEST, 0.0, 0.0)):
            ref[...] = jnp.full(ref.shape, value, ref.dtype)

    begin = jnp.maximum(first[tile], fetched)
    lax.fori_loop(begin, jnp.minimum(last[tile] + 1, fetched + blocks.fetch), block, None)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        for n, t in enumerate(pieces):
            _write(results, t, top_ref[n], total_ref[n], sum_ref[n], plan)


def _unpack(refs, plan: Plan):
    """Operands of the mask; queries, keys and values; results, `None` if not wanted; the rest."""
    n = 0 if plan.stated else 3
    mask, qkv, rest = refs[:n], refs[n : n + 3], refs[n + 3 :]
    return (
        (mask, qkv, rest[:2], rest[2:]) if plan.with_lse else (mask, qkv, (rest[0], None), rest[1:])
    )


def _ahead_of_use(function, arguments):
    """Arguments and results, of which each is asked for before the last is used.

    So the matrix unit has the scores of the next piece to compute during a softmax.
    """
    last = None
    for argument in arguments:
        new = argument, function(argument)
        if last is not None:
            yield last
        last = new
    yield last


def _at(b, i, count, plan: Plan):
    """Where a tile's facts lie in scalar memory: all rows share them if the spec states them."""
    return i if plan.stated else b * count + i


def _first_key(i, plan: Plan):
    return jnp.maximum(plan.offset + i * plan.blocks.q - plan.before, 0)


def _product(a, b, plan: Plan):
    # Named in both cases: a process may have set another default, which bfloat16 does not have.
    precision = lax.Precision.HIGHEST if plan.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)


def _scores(q_ref, t, k_HS, plan: Plan):
    q_GPH = q_ref[:, pl.ds(t, plan.blocks.piece)]
    s_RS = _product(q_GPH.reshape(-1, plan.width), k_HS, plan)
    cap = plan.spec.soft_cap
    return s_RS if cap is None else cap * LOG2_E * jnp.tanh(s_RS)


def _mask(s_RS, kind, ahead, t, at, mask_refs, plan: Plan):
    """The scores of a piece, `MASKED` where its queries do not see the keys.

    `kind` says how that is known: "all" are seen; by "positions"; by "rows" whose numbers are known
    when the kernel runs; or at compile time, in a "window"; "tail": keys beyond the last are not.
    `ahead` is the row of the first key minus that of the first query, or of the end of the keys.
    """
    if kind == "all":
        return s_RS
    piece, S = plan.blocks.piece, s_RS.shape[1]
    if kind == "positions":
        lo_ref, hi_ref, pos_ref = mask_refs
        lo_P1, hi_P1 = (_column(ref[:, pl.ds(t, piece)]) for ref in (lo_ref, hi_ref))
        pos_1S = pos_ref[:, at]
        return _where((pos_1S >= jnp.maximum(lo_P1, 0)) & (pos_1S < hi_P1), s_RS, plan)
    if kind == "tail":
        return _where(lax.broadcasted_iota(jnp.int32, (piece, S), 1) < -ahead, s_RS, plan)
    if kind == "rows":
        return _where(_seen(ahead, S, (True, plan.spec.window is not None), plan), s_RS, plan)
    # Columns that need the same comparisons go together; most need none.
    parts = []
    for compared, columns in groupby(range(0, S, LANES), lambda c: _compared(ahead + c, plan)):
        start, *rest = columns
        size = LANES * (1 + len(rest))
        seen_PS = _seen(ahead + start, size, compared, plan)
        parts.append(_where(seen_PS, s_RS[:, start : start + size], plan))
    return jnp.concatenate(parts, axis=1)


def _compared(ahead: int, plan: Plan) -> tuple[bool, bool]:
    """Whether some of the next 128 keys lie after some query of a piece, or before its window."""
    return ahead + LANES > 1, ahead - plan.blocks.piece + 1 <= -plan.spec.window


def _seen(ahead, size: int, compared: tuple[bool, bool], plan: Plan):
    """Which of `size` keys the queries of a piece see, by rows; `None` if nothing is compared."""
    shape = (plan.blocks.piece, size)
    delta_PS = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
    after, before = compared
    seen_PS = delta_PS <= -ahead if after else None
    if before:
        inside_PS = delta_PS > -plan.spec.window - ahead
        seen_PS = inside_PS if seen_PS is None else seen_PS & inside_PS
    return seen_PS


def _where(seen_PS, s_RS, plan: Plan):
    """All heads of a group have the same mask."""
    if seen_PS is None:
        return s_RS
    s_GPS = s_RS.reshape(plan.groups, *seen_PS.shape)
    return jnp.where(seen_PS, s_GPS, MASKED).reshape(s_RS.shape)


def _write(results, t, top_RL, total_RL, sum_RH, plan: Plan) -> None:
    """Results of a piece; a row that saw nothing gets 0, and -inf."""
    out_ref, lse_ref = results
    at = pl.ds(t, plan.blocks.piece)
    sees_RL = total_RL > 0
    safe_RL = jnp.where(sees_RL, total_RL, 1.0)
    out_RH = sum_RH * _wide(jnp.where(sees_RL, 1.0 / safe_RL, 0.0), plan.width)
    out_ref[:, at] = out_RH.reshape(plan.groups, -1, plan.width).astype(plan.dtype)
    if lse_ref is not None:
        lse_RL = jnp.where(sees_RL, top_RL / LOG2_E + jnp.log(safe_RL), -jnp.inf)
        for g, lse_PL in enumerate(lse_RL.reshape(plan.groups, -1, LANES)):
            lse_ref[g : g + 1, at] = lse_PL.T[:1]


def _column(x_1P: jax.Array) -> jax.Array:
    """`[1, P]` as `[P, 1]`: along rows instead of lanes."""
    return jnp.broadcast_to(x_1P, (LANES, x_1P.shape[1])).T[:, :1]


def _in_lanes(x_R1: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x_R1, (len(x_R1), LANES))


def _wide(x_RL: jax.Array, size: int) -> jax.Array:
    """A value per row, held in all lanes, for `size` columns."""
    return jnp.tile(x_RL, (1, size // LANES))


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _pad(x: jax.Array, axis: int, size: int, **how) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n) if i == axis else (0, 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, **how)
