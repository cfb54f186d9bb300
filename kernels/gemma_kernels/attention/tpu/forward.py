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

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.attention import tiles
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.attention.tpu.forward_kernels import (
    LANES,
    LOG2_E,
    Blocks,
    Plan,
    fact_at,
    first_key,
    round_up,
    running_kernel,
    window_kernel,
)

VMEM_LIMIT = 48 * 2**20


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
        width=round_up(H, LANES),
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
        keys = round_up(S, blocks.k * blocks.fetch)
    else:
        keys = round_up(plan.offset + count * blocks.q, LANES)

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
        return b, h, 0, first_key(i, plan)

    def values_of(b, h, i, plain):
        return b, h, first_key(i, plan), 0

    def positions_of(b, h, i, plain):
        return b, 0, first_key(i, plan)

    one = pl.squeezed
    return _call(
        partial(window_kernel, plan=plan),
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
        visible = tiles.static_visible_blocks(
            plan.keys - plan.offset, plan.keys, blocks.q, blocks.k, causal, window
        )
        some_Bij, whole_Bij = (jnp.asarray(x)[None] for x in visible)
    else:
        some_Bij, whole_Bij = tiles.visible_blocks(*(x[:, 0] for x in mask), blocks.q, blocks.k)

    def fetch_of(b, i, j, first, last):
        tile = fact_at(b, i, count, plan)
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
        partial(running_kernel, plan=plan),
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


def _pad(x: jax.Array, axis: int, size: int, **how) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n) if i == axis else (0, 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, **how)
