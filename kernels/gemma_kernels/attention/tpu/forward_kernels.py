"""The two kernels of `tpu_forward.py`: a tile with all of its keys, and one with some of them.

Local letters: R rows of queries of a piece; L lanes.
"""

import math
from dataclasses import dataclass
from itertools import groupby

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gemma_kernels.attention.spec import AttentionSpec

LANES = 128
MASKED = -1e30
LOWEST = -1e29  # of a row's maximum: a row that sees nothing gets weights 0, not 1
LOG2_E = math.log2(math.e)


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
        return round_up(self.before + self.blocks.piece, LANES)

    @property
    def vmem_bytes(self) -> int:
        """The sum in `tpu_forward.py`; a bound: the compiler uses the space of scores again."""
        blocks, width = self.blocks, self.width
        fetched, keys = self.span, self.span and self.reach
        running = 0
        if self.span is None:
            fetched, keys = blocks.k * blocks.fetch, blocks.k
            running = 4 * (width + 2 * LANES) * self.groups * blocks.q
        copies = 4 * jnp.dtype(self.dtype).itemsize * width * (fetched + self.groups * blocks.q)
        return copies + running + 6 * self.groups * blocks.piece * keys


def window_kernel(plain, *refs, plan: Plan):
    """One tile with all of its keys."""
    mask_refs, (q_ref, k_ref, v_ref), results, _ = _unpack(refs, plan)
    i, blocks = pl.program_id(2), plan.blocks
    # How far the keys at hand lie behind the regular ones: where those would begin before row 0.
    shift = first_key(i, plan) - (plan.offset + i * blocks.q - plan.before)

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

    is_plain = plain[fact_at(pl.program_id(0), i, pl.num_programs(2), plan)] == 1
    pl.when(is_plain)(lambda: attend("window"))
    pl.when(~is_plain)(lambda: attend("rows" if plan.stated else "positions"))


def running_kernel(first, last, whole_first, whole_last, *refs, plan: Plan):
    """One tile with some of its keys."""
    mask_refs, (q_ref, k_ref, v_ref), results, running = _unpack(refs, plan)
    top_ref, total_ref, sum_ref = running
    blocks, i, step = plan.blocks, pl.program_id(2), pl.program_id(3)
    tile = fact_at(pl.program_id(0), i, pl.num_programs(2), plan)
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


def fact_at(b, i, count, plan: Plan):
    """Where a tile's facts lie in scalar memory: all rows share them if the spec states them."""
    return i if plan.stated else b * count + i


def first_key(i, plan: Plan):
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


def round_up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple
