"""Which blocks of keys a tile of queries meets, on Hopper, and the other way round.

The mask is one interval of key positions per query, so what a tile of queries can see follows from
the least and the greatest bound in the tile, and from the least and the greatest position in a
block of keys. A block is

    dead     no query of the tile sees a key of it: neither loaded nor computed
    whole    every query (that sees any key at all) sees every key of it: not masked
    edge     anything else: computed under the mask

and the kernels run through the blocks of a tile in three loops:

    dead ... dead | edge ... edge | whole ... whole | edge ... edge | dead ... dead
                  ^ first         ^ whole           ^ whole_end     ^ end

Keys in any order give right results: dead and whole blocks outside of their run count as edges.
Queries with an empty interval are of no concern here. They make no block live and no block an
edge, so kernels must zero their rows.

Local letters: I tiles of queries; J blocks of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.attention.tiles import visible_blocks
from gemma_kernels.mosaic_gpu import LOG2_E, tanh


class Runs(NamedTuple):
    """Per tile, int32: blocks `[first, end)` are live, and of those `[whole, whole_end)` whole.

    Without a whole block both of its ends are `end`; without a live one all four are 0.
    """

    first: jax.Array
    whole: jax.Array
    whole_end: jax.Array
    end: jax.Array


def classify(
    lo_BT: jax.Array, hi_BT: jax.Array, kv_pos_BS: jax.Array, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """Flags `live` and `whole`, bool `[B, tiles of queries, blocks of keys]`.

    They feed reductions only (`runs`), with which XLA fuses them; `T` and `S` may be ragged.
    """
    lo_BT, hi_BT = (pad_axis(x, 1, block_q) for x in (lo_BT, hi_BT))
    kv_pos_BS = pad_axis(kv_pos_BS, 1, block_k, -1)
    return visible_blocks(lo_BT, hi_BT, kv_pos_BS, block_q, block_k, unseeing=False)


def runs(live_BIJ: jax.Array, whole_BIJ: jax.Array) -> Runs:
    """The runs along the last axis. Swap the axes for the tiles of queries that a block meets."""
    index_J = jnp.arange(live_BIJ.shape[2], dtype=jnp.int32)
    end_BI = jnp.max(jnp.where(live_BIJ, index_J + 1, 0), axis=2)

    def first_of(flags_BIJ):
        return jnp.min(jnp.where(flags_BIJ, index_J, end_BI[:, :, None]), axis=2)

    whole_BI = first_of(whole_BIJ)
    whole_end_BI = first_of(~whole_BIJ & (index_J > whole_BI[:, :, None]))
    return Runs(first_of(live_BIJ), whole_BI, whole_end_BI, end_BI)


def key_runs(lo_BT, hi_BT, kv_pos_BS, block_q: int, block_k: int) -> jax.Array:
    """The four of `Runs` over blocks of keys, for tiles of queries: int32 `[4, B, tiles]`."""
    return jnp.stack(runs(*classify(lo_BT, hi_BT, kv_pos_BS, block_q, block_k)))


def pad_axis(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """`x` with `value` after it along `axis`, up to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)


def scores_in_log2(scores: jax.Array, spec: AttentionSpec) -> tuple[jax.Array, float]:
    """Scaled and capped scores, and a positive factor that makes them exponents of 2."""
    if spec.soft_cap is not None:
        return tanh(scores * (spec.scale / spec.soft_cap)), spec.soft_cap * LOG2_E
    if spec.scale <= 0:
        return scores * spec.scale, LOG2_E
    return scores, spec.scale * LOG2_E
