"""The gradient of attention on TPU as Pallas kernels: five matrix products, each sum kept in VMEM.

Per tile of queries and keys the weights are recomputed from the stored log-sum-exp, transposed
(keys are rows), so that what belongs to a query lies along lanes and no such tile is turned around:

    p  = exp(k q' - lse)          dv += p dout
    ds = p (v dout' - delta)      dk += ds q         dq' += k' ds

The query heads of a group are columns of one matrix; that sums dk and dv over the group. Tiles of
queries are visited in order, with the sums of dk and dv that are still open in VMEM, in float32:

    a window is promised   (`ring_kernel`) keys enter a ring of blocks, each as long as a tile of
                           queries, enough for the window and the tile, and leave it once complete:

                               keys     0   1   2   3   4   5
                               tile 3       [   ring    ]            1 leaves after this step,
                               tile 4           [   ring    ]        its slot takes 5

                           Tiles whose mask is the plain causal window take comparisons known at
                           compile time, on the blocks at the window's two edges alone.
    anything else          (`row_kernel`) all keys of a row stay, or of a part of a row where they
                           would not fit; dq is then the sum over the parts. Blocks outside of the
                           mask are skipped, those that a tile sees whole are not masked.

VMEM of the ring for heads of 256, window 1,024, tiles of 512: 3 slots of 512 keys, k and v in
bfloat16 and dk, dv in float32, 4.5 MB; tiles of q, dout, dq and of k, v, dk, dv, twice each for the
pipeline, 5 MB for two query heads. A row takes 24 bytes per key and lane: 6 KB for heads of 256, so
parts of rows are 8,192 keys long where a core has 128 MB, and 4,096 where it has 64 MB.

Local letters: R queries of all heads of a group.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gemma_kernels.attention.spec import AttentionSpec

LANES = 128
MASKED = -1e30
LOG2_E = math.log2(math.e)
NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


@dataclass(frozen=True)
class BackwardBlocks:
    """Sizes of tiles, multiples of 128.

    Attributes:
      q: Queries (per head) of a grid step. With a window also the keys of a slot of the ring.
      piece: Queries (per head) of a matrix product; divides `q`.
      k: Keys of a matrix product, at most; divides `q` with a window.
      part: Queries that go over the keys together, with a window and where a tile's mask is not
        the plain one; the fewer, the fewer pairs that do not see each other. `None`: all.
      row: Keys that stay in VMEM without a window, a multiple of `k`; `None`: as many as fit.
    """

    q: int = 512
    piece: int = 256
    k: int = 256
    row: int | None = None
    part: int | None = None

    def __post_init__(self):
        sizes = {"q": self.q, "piece": self.piece, "k": self.k, "row": self.row or LANES}
        for name, size in sizes.items():
            if size < LANES or size % LANES:
                raise ValueError(f"tiles must be multiples of {LANES}, got {name}={size}")
        if self.q % self.piece:
            raise ValueError(f"q={self.q} must be a multiple of piece={self.piece}")
        if self.row is not None and self.row % self.k:
            raise ValueError(f"row={self.row} must be a multiple of k={self.k}")
        if self.part is not None and (self.part % self.piece or self.q % self.part):
            raise ValueError(
                f"part={self.part} must be a multiple of piece={self.piece} and divide q={self.q}"
            )


@dataclass(frozen=True)
class Plan:
    """What a kernel knows at compile time.

    Attributes:
      slots: Slots of the ring; 0 without one.
      own: With a ring, the block of keys that the queries of tile 0 belong to.
      tiles: Tiles of queries.
      key_blocks: Blocks of keys that pass through the ring, or stay.
      factor: What keys are scaled by, so that scores are exponents of two or fractions of the cap.
    """

    blocks: BackwardBlocks
    spec: AttentionSpec
    groups: int
    width: int
    dtype: jnp.dtype
    slots: int
    own: int
    tiles: int
    key_blocks: int

    @property
    def factor(self) -> float:
        cap = self.spec.soft_cap
        return self.spec.scale * (LOG2_E if cap is None else 1 / cap)

    @property
    def starts(self) -> range:
        """First queries of the pieces of a tile."""
        return range(0, self.blocks.q, self.blocks.piece)

    @property
    def part(self) -> int:
        """Queries that go over the keys together."""
        return self.blocks.part or self.blocks.q


class _Refs(NamedTuple):
    """Operands of one tile of queries, and the keys by block, with the sums of their gradients."""

    lo: jax.Ref
    hi: jax.Ref
    lse: jax.Ref
    delta: jax.Ref
    q: jax.Ref
    dout: jax.Ref
    pos: jax.Ref
    k: jax.Ref
    v: jax.Ref
    dk: jax.Ref
    dv: jax.Ref
    dq_sum: jax.Ref


class _Unit(NamedTuple):
    """Some keys, where they lie in the blocks, and the pieces of a tile of queries that meet them:
    the first query of each, and which of the keys they see, `None` for all.

    `new`: nothing was summed for these keys yet, so their sums are set instead of added to."""

    at: tuple
    pieces: list[tuple[int, jax.Array | None]]
    new: bool = False


def ring_kernel(first, last, plain, *refs, plan: Plan) -> None:
    """One grid step: a block of keys enters, a tile of queries is served, a block leaves."""
    *queries, k_in, v_in, dq_out, dk_out, dv_out, dq_sum, k, v, dk, dv = refs
    refs = _Refs(*queries, k, v, dk, dv, dq_sum)
    step = pl.program_id(2)
    entering, leaving = lax.rem(step, plan.slots), lax.rem(step + 1, plan.slots)
    k[entering], v[entering] = k_in[...], v_in[...]

    live = (step >= plan.own) & (step < plan.own + plan.tiles)
    tile = pl.program_id(0) * plan.tiles + jnp.clip(step - plan.own, 0, plan.tiles - 1)
    is_plain = live & (plain[tile] == 1)
    window_units = _window_units(step, plan)
    set_keys = sum(unit.new for units in window_units for unit in units) * plan.blocks.k
    sets_all = set_keys == plan.blocks.q

    def clear():
        dk[entering] = dv[entering] = jnp.zeros(dk.shape[1:], jnp.float32)

    if plan.own:
        pl.when(step < plan.own)(clear)

    @pl.when(is_plain)
    def _():
        if not sets_all:
            clear()
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for n, units in enumerate(window_units):
            units = [unit._replace(new=unit.new and sets_all) for unit in units]
            # The last dq comes before the last dk and dv: their products take as long as turning
            # it around, and nothing else is left for v5e's matrix units by then.
            _accumulate(units, refs, plan, dq_first=n == len(window_units) - 1)
        _write_dq(dq_out, dq_sum, plan)

    @pl.when(live & ~is_plain)
    def _():
        clear()
        dq_sum[...] = jnp.zeros_like(dq_sum)
        per_slot = plan.blocks.q // plan.blocks.k
        oldest, newest = (step + 1 - plan.slots) * per_slot, (step + 1) * per_slot - 1
        for start in range(0, plan.blocks.q, plan.part):
            starts = range(start, start + plan.part, plan.blocks.piece)

            def block(j, _, starts=starts):
                begin = pl.multiple_of(lax.rem(j, per_slot) * plan.blocks.k, LANES)
                at = (lax.rem(j // per_slot, plan.slots), pl.ds(begin, plan.blocks.k))
                pieces = [(t, _seen_by_position(j, t, refs, plan)) for t in starts]
                _accumulate([_Unit(at, pieces)], refs, plan)
                return 0

            part = tile * (plan.blocks.q // plan.part) + start // plan.part
            begin, end = jnp.maximum(first[part], oldest), jnp.minimum(last[part], newest)
            lax.fori_loop(begin, end + 1, block, 0)
        _write_dq(dq_out, dq_sum, plan)

    dk_out[...] = (dk[leaving] * plan.spec.scale).astype(dk_out.dtype)
    dv_out[...] = dv[leaving].astype(dv_out.dtype)


def row_kernel(first, last, plain_first, plain_last, *refs, plan: Plan) -> None:
    """One grid step: a tile of queries meets the blocks of a row that it sees."""
    *queries, k, v, dq_out, dk, dv, dq_sum = refs
    refs = _Refs(*queries, k, v, dk, dv, dq_sum)
    tile = pl.program_id(0) * plan.tiles + pl.program_id(2)
    dq_sum[...] = jnp.zeros_like(dq_sum)

    @pl.when(pl.program_id(2) == 0)
    def _():
        @pl.loop(0, plan.key_blocks)
        def _(j):
            dk[j] = dv[j] = jnp.zeros(dk.shape[1:], jnp.float32)

    def block(j, _):
        at = (j, slice(None))
        plain = (j >= plain_first[tile]) & (j <= plain_last[tile])

        @pl.when(plain)
        def _():
            _accumulate([_Unit(at, [(t, None) for t in plan.starts])], refs, plan)

        @pl.when(~plain)
        def _():
            pieces = [(t, _seen_by_position(j, t, refs, plan)) for t in plan.starts]
            _accumulate([_Unit(at, pieces)], refs, plan)

        return 0

    lax.fori_loop(first[tile], last[tile] + 1, block, 0)
    _write_dq(dq_out, dq_sum, plan)


def _accumulate(units: list[_Unit], refs: _Refs, plan: Plan, dq_first: bool = False) -> None:
    """Adds what the units give to dq, dk and dv, or to dq before the others.

    Step by step over all units, not unit by unit: their products are independent, and the compiler
    fills the matrix units with those that stand side by side (a quarter fewer cycles on v6e).
    """
    # Named in both cases: a process may have set another default, which bfloat16 does not have.
    precision = lax.Precision.HIGHEST if plan.dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = partial(lax.dot_general, preferred_element_type=jnp.float32, precision=precision)

    def operand(ref, t):
        return ref[:, t : t + plan.blocks.piece].reshape(-1, plan.width)

    def row(ref, t):
        """`[1, R]`: a number per query, the heads of the group side by side."""
        at = slice(t, t + plan.blocks.piece)
        return jnp.concatenate([ref[g : g + 1, at] for g in range(plan.groups)], axis=1)

    def add_dq(at, met):
        k_HS = refs.k[at].T
        for t, _, ds_SR in met:
            refs.dq_sum[t // plan.blocks.piece] += dot(k_HS, ds_SR, NN)

    products = [
        [(dot(refs.k[at], operand(refs.q, t), NT), dot(refs.v[at], operand(refs.dout, t), NT))
         for t, _ in pieces]
        for at, pieces, _ in units
    ]  # fmt: skip
    weights = [
        [_weights(*product, row(refs.lse, t), row(refs.delta, t), seen_SR, plan)
         for (t, seen_SR), product in zip(pieces, of_unit)]
        for (_, pieces, _), of_unit in zip(units, products)
    ]  # fmt: skip
    for (at, pieces, new), of_unit in zip(units, weights):
        met = [(t, p_SR, ds_SR) for (t, _), (p_SR, ds_SR) in zip(pieces, of_unit)]
        if dq_first:
            add_dq(at, met)
        dv_SH = sum(dot(p_SR, operand(refs.dout, t), NN) for t, p_SR, _ in met)
        dk_SH = sum(dot(ds_SR, operand(refs.q, t), NN) for t, _, ds_SR in met)
        refs.dv[at] = dv_SH if new else refs.dv[at] + dv_SH
        refs.dk[at] = dk_SH if new else refs.dk[at] + dk_SH
        if not dq_first:
            add_dq(at, met)


def _weights(s_SR, dp_SR, lse_1R, delta_1R, seen_SR, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """What attention weighed the values by, and the gradient of the scores before the cap."""
    cap = plan.spec.soft_cap
    if cap is not None:
        tanh_SR = jnp.tanh(s_SR)
        s_SR, slope_SR = cap * LOG2_E * tanh_SR, 1 - tanh_SR * tanh_SR
    if seen_SR is not None:
        s_SR = jnp.where(jnp.concatenate([seen_SR] * plan.groups, axis=1), s_SR, MASKED)
    p_SR = jnp.exp2(s_SR - lse_1R)
    ds_SR = p_SR * (dp_SR - delta_1R)
    if cap is not None:
        ds_SR *= slope_SR
    return p_SR.astype(plan.dtype), ds_SR.astype(plan.dtype)


def _write_dq(dq_out, dq_sum, plan: Plan) -> None:
    """Turns the finished sums around; their keys were scaled by `factor`."""
    for i, t in enumerate(plan.starts):
        dq_RH = dq_sum[i].T * (plan.spec.scale / plan.factor)
        dq_GRH = dq_RH.astype(dq_out.dtype).reshape(plan.groups, plan.blocks.piece, plan.width)
        dq_out[:, t : t + plan.blocks.piece] = dq_GRH


def _window_units(step, plan: Plan) -> list[list[_Unit]]:
    """What a tile computes whose mask is the plain causal window, by blocks of keys."""
    size, piece, block, window = plan.blocks.q, plan.blocks.piece, plan.blocks.k, plan.spec.window
    before = (plan.slots - 1) * size  # rows of the ring ahead of the tile's own
    met = {}  # keys [x, end) of the ring: pieces that meet them
    for t in plan.starts:
        # From the 128 rows that hold the oldest key of the first query, up to its own of the last.
        edges = [(before + t - window + 1) // LANES * LANES, before + t + piece]
        edges[1:1] = range((edges[0] // block + 1) * block, edges[1], block)
        for x, end in itertools.pairwise(edges):
            seen_SR = _seen_by_row(x - before - t, (end - x, piece), window)
            met.setdefault((x, end), []).append((t, seen_SR))
    units = {}
    for x, end in sorted(met, key=lambda keys: (keys[0] // block, keys[0] - keys[1])):
        at = (lax.rem(step + 1 + x // size, plan.slots), pl.ds(x % size, end - x))
        # The longest of a block comes first. Keys of the newest slot have met no queries before.
        new = x >= before and x // block not in units and end - x == block
        units.setdefault(x // block, []).append(_Unit(at, met[x, end], new))
    return list(units.values())


def _seen_by_row(ahead: int, shape: tuple[int, int], window: int) -> jax.Array | None:
    """Which keys queries see under a plain causal window; the first key is `ahead` of the first."""
    keys, queries = shape
    delta_SR = lax.broadcasted_iota(jnp.int32, shape, 0) - lax.broadcasted_iota(jnp.int32, shape, 1)
    seen_SR = None
    if ahead - (queries - 1) <= -window:
        seen_SR = delta_SR > -window - ahead
    if ahead + keys - 1 > 0:
        before_SR = delta_SR <= -ahead
        seen_SR = before_SR if seen_SR is None else seen_SR & before_SR
    return seen_SR


def _seen_by_position(j, t: int, refs: _Refs, plan: Plan) -> jax.Array:
    """Which keys of block `j` queries from `t` on of a tile see, by the intervals."""
    size = plan.blocks.k
    pos_1S = refs.pos[:, pl.ds(pl.multiple_of(j * size, LANES), size)]
    pos_S1 = jnp.broadcast_to(pos_1S, (LANES, size)).T[:, :1]
    lo_1R, hi_1R = (ref[:, t : t + plan.blocks.piece] for ref in (refs.lo, refs.hi))
    return (pos_S1 >= jnp.maximum(lo_1R, 0)) & (pos_S1 < hi_1R)
