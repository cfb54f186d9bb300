"""Attention in plain XLA, for any backend: query blocks, and for each only the keys it can see.

The query heads of a key head and the queries of a block are rows of one matrix, `[B, K, rows, H]`,
which meets its keys in tiles `[B, K, rows, tile]`:

    decode, short prompts    one tile of all keys
    local layers             one tile of `block_q + window - 1` keys, cut out of the key axis
    global layers            tiles of `BLOCK_K` keys under a running softmax; tiles that hold no
                             visible key (later tokens, empty cache slots) cost a branch each

Without a mask (vision towers) heads come one by one, each with blocks of its queries against all
keys, `[B, block_q, S]`: on a CPU such a tile stays in cache, which makes it thrice as fast for a
SigLIP layer as a tile of all heads.

So local layers are linear in the length, no `[T, S]` array exists beyond a tile, and the backward
pass recomputes each query block instead of storing its tiles.

Local letters: R rows: query heads of a key head, and queries of a block.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from gemma_kernels.attention.mask import visible
from gemma_kernels.attention.spec import AttentionSpec

BLOCK_Q, BLOCK_K = 128, 512
UNMASKED_BLOCK_Q = 256
MASKED = -1e30  # below any score; finite, so that a row without keys gives 0 and not nan


def attention_xla(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    kv_pos_BS: jax.Array,
    spec: AttentionSpec,
    *,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Same results as `reference.attention_reference`."""
    out_BTNH, lse_BTN = _out_and_lse(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec)
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def _out_and_lse(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if not spec.masked:
        return _head_by_head(q_BTNH, k_BSKH, v_BSKH, spec)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    one_block = _block_of_queries(k_BSKH, v_BSKH, kv_pos_BS, spec, min(T, BLOCK_Q))
    if T <= BLOCK_Q:
        out_BTKGH, lse_BTKG = one_block(q_BTKGH, lo_BT, hi_BT, S - T)
        return out_BTKGH.reshape(B, T, N, H), lse_BTKG.reshape(B, T, N)

    blocks = math.ceil(T / BLOCK_Q)
    # Padding queries have an empty interval [0, 0): they see nothing and are cut off below.
    q_nBtKGH, lo_nBt, hi_nBt = (_split(x, blocks) for x in (q_BTKGH, lo_BT, hi_BT))
    offsets = S - T + BLOCK_Q * jnp.arange(blocks)
    one_block = jax.checkpoint(one_block)
    _, (out_nBtKGH, lse_nBtKG) = lax.scan(
        lambda carry, xs: (carry, one_block(*xs)), None, (q_nBtKGH, lo_nBt, hi_nBt, offsets)
    )
    out_BTNH = jnp.moveaxis(out_nBtKGH, 0, 1).reshape(B, blocks * BLOCK_Q, N, H)
    lse_BTN = jnp.moveaxis(lse_nBtKG, 0, 1).reshape(B, blocks * BLOCK_Q, N)
    return out_BTNH[:, :T], lse_BTN[:, :T]


def _block_of_queries(k_BSKH, v_BSKH, kv_pos_BS, spec, T):
    """The function of one block of `T` queries: `(q_BTKGH, lo_BT, hi_BT, offset)` to out
    `[B, T, K, G, H]` and lse `[B, T, K, G]`.

    `offset` is the key row of its first query under `spec.window`.
    """
    S = k_BSKH.shape[1]
    # Heads before keys, as caches keep them and products read them; cut once for all blocks.
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    span = T + (spec.window or S) - 1
    if span < S:

        def of_rows(q_BKRH, lo_BT, hi_BT, offset):
            start = jnp.clip(offset - (spec.window - 1), 0, S - span)
            k, v = (lax.dynamic_slice_in_dim(x, start, span, 2) for x in (k_BKSH, v_BKSH))
            pos = lax.dynamic_slice_in_dim(kv_pos_BS, start, span, 1)
            return _one_tile(q_BKRH, k, v, lo_BT, hi_BT, pos, spec)

    elif T > 1 and S >= 2 * BLOCK_K:
        tiles = math.ceil(S / BLOCK_K)
        k_nBKSH, v_nBKSH = (_split(x, tiles, BLOCK_K, axis=2) for x in (k_BKSH, v_BKSH))
        pos_nBS = _split(kv_pos_BS, tiles, BLOCK_K, fill=-1)

        def of_rows(q_BKRH, lo_BT, hi_BT, offset):
            return _running_softmax(q_BKRH, lo_BT, hi_BT, (k_nBKSH, v_nBKSH, pos_nBS), spec)

    else:

        def of_rows(q_BKRH, lo_BT, hi_BT, offset):
            return _one_tile(q_BKRH, k_BKSH, v_BKSH, lo_BT, hi_BT, kv_pos_BS, spec)

    def block(q_BTKGH, lo_BT, hi_BT, offset):
        B, _, K, G, H = q_BTKGH.shape
        q_BKRH = jnp.moveaxis(q_BTKGH, 1, 3).reshape(B, K, G * T, H)
        out_BKRH, lse_BKR = of_rows(q_BKRH, lo_BT, hi_BT, offset)
        out_BTKGH = jnp.moveaxis(out_BKRH.reshape(B, K, G, T, H), 3, 1)
        return out_BTKGH, jnp.moveaxis(lse_BKR.reshape(B, K, G, T), 3, 1)

    return block


def _one_tile(q_BKRH, k_BKSH, v_BKSH, lo_BT, hi_BT, kv_pos_BS, spec):
    p_BKRS, top_BKR1 = _exp_scores(q_BKRH, k_BKSH, lo_BT, hi_BT, kv_pos_BS, spec)
    total_BKR1 = jnp.sum(p_BKRS, axis=-1, keepdims=True)
    return _normalise(_weigh(p_BKRS, v_BKSH), total_BKR1, top_BKR1, q_BKRH.dtype)


def _running_softmax(q_BKRH, lo_BT, hi_BT, tiles, spec):
    B, K, R, H = q_BKRH.shape
    first_B, last_B = jnp.min(jnp.where(hi_BT > lo_BT, lo_BT, 2**30), 1), jnp.max(hi_BT, 1)

    def tile(carry, xs):
        k_BKSH, v_BKSH, pos_BS = xs
        live = jnp.any((pos_BS >= first_B[:, None]) & (pos_BS < last_B[:, None]) & (pos_BS >= 0))

        def update(carry):
            top_BKR1, total_BKR1, sum_BKRH = carry
            p_BKRS, new_top = _exp_scores(q_BKRH, k_BKSH, lo_BT, hi_BT, pos_BS, spec, top_BKR1)
            keep_BKR1 = jnp.exp(top_BKR1 - new_top)
            total_BKR1 = total_BKR1 * keep_BKR1 + jnp.sum(p_BKRS, axis=-1, keepdims=True)
            return new_top, total_BKR1, sum_BKRH * keep_BKR1 + _weigh(p_BKRS, v_BKSH)

        return lax.cond(live, update, lambda carry: carry, carry), None

    start = (
        jnp.full((B, K, R, 1), MASKED, jnp.float32),
        jnp.zeros((B, K, R, 1), jnp.float32),
        jnp.zeros((B, K, R, H), jnp.float32),
    )
    (top_BKR1, total_BKR1, sum_BKRH), _ = lax.scan(tile, start, tiles)
    return _normalise(sum_BKRH, total_BKR1, top_BKR1, q_BKRH.dtype)


def _head_by_head(q_BTNH, k_BSKH, v_BSKH, spec):
    """Every query sees every key."""
    B, T, N, H = q_BTNH.shape
    groups = N // k_BSKH.shape[2]
    size = min(T, UNMASKED_BLOCK_Q)
    blocks = math.ceil(T / size)
    q_NnBtH = jnp.moveaxis(_split(q_BTNH, blocks, size), 3, 0)
    k_NBSH, v_NBSH = (jnp.repeat(jnp.moveaxis(x, 2, 0), groups, axis=0) for x in (k_BSKH, v_BSKH))

    @jax.checkpoint
    def block(q_BtH, k_BSH, v_BSH):
        return _unmasked_tile(q_BtH, k_BSH, v_BSH, spec)

    def head(xs):
        q_nBtH, k_BSH, v_BSH = xs
        return lax.map(lambda q_BtH: block(q_BtH, k_BSH, v_BSH), q_nBtH)

    out_NnBtH, lse_NnBt = lax.map(head, (q_NnBtH, k_NBSH, v_NBSH))
    out_BTNH = jnp.transpose(out_NnBtH, (2, 1, 3, 0, 4)).reshape(B, blocks * size, N, H)
    lse_BTN = jnp.transpose(lse_NnBt, (2, 1, 3, 0)).reshape(B, blocks * size, N)
    return out_BTNH[:, :T], lse_BTN[:, :T]


def _unmasked_tile(q_BTH, k_BSH, v_BSH, spec):
    exact = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    s_BTS = spec.scale * jnp.einsum("BTH,BSH->BTS", q_BTH, k_BSH, **exact)
    s_BTS = _cap(s_BTS, spec, q_BTH.dtype)
    top_BT1 = lax.stop_gradient(jnp.max(s_BTS, axis=-1, keepdims=True))
    p_BTS = jnp.exp(s_BTS - top_BT1)
    sum_BTH = jnp.einsum("BTS,BSH->BTH", p_BTS.astype(v_BSH.dtype), v_BSH, **exact)
    total_BT1 = jnp.sum(p_BTS, axis=-1, keepdims=True)
    lse_BT = (top_BT1 + jnp.log(total_BT1))[..., 0]
    return (sum_BTH / total_BT1).astype(q_BTH.dtype), lse_BT


def _cap(scores, spec, dtype):
    """The scores as the softmax takes them: rounded if asked for, capped if asked for."""
    if not spec.softmax_in_float32:
        scores = scores.astype(dtype).astype(jnp.float32)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    return scores


def _exp_scores(q_BKRH, k_BKSH, lo_BT, hi_BT, kv_pos_BS, spec, floor_BKR1=MASKED):
    """`exp(scores - top)` (0 where masked) and `top`, at least `floor_BKR1`."""
    exact = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    s_BKRS = spec.scale * jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, **exact)
    s_BKRS = _cap(s_BKRS, spec, q_BKRH.dtype)
    groups = q_BKRH.shape[2] // lo_BT.shape[1]
    seen_B1RS = jnp.tile(visible(lo_BT, hi_BT, kv_pos_BS), (1, groups, 1))[:, None]
    s_BKRS = jnp.where(seen_B1RS, s_BKRS, MASKED)
    top_BKR1 = jnp.maximum(jnp.max(s_BKRS, axis=-1, keepdims=True), floor_BKR1)
    top_BKR1 = lax.stop_gradient(top_BKR1)
    return jnp.where(seen_B1RS, jnp.exp(s_BKRS - top_BKR1), 0.0), top_BKR1


def _weigh(p_BKRS, v_BKSH):
    exact = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.einsum("BKRS,BKSH->BKRH", p_BKRS.astype(v_BKSH.dtype), v_BKSH, **exact)


def _normalise(sum_BKRH, total_BKR1, top_BKR1, dtype):
    """Output, and the logarithm of the softmax's denominator; 0 and -inf where nothing is seen."""
    none_BKR1 = total_BKR1 == 0
    safe_BKR1 = jnp.where(none_BKR1, 1.0, total_BKR1)
    lse_BKR1 = jnp.where(none_BKR1, -jnp.inf, top_BKR1 + jnp.log(safe_BKR1))
    return (sum_BKRH / safe_BKR1).astype(dtype), lse_BKR1[..., 0]


def _split(x, blocks: int, size: int = BLOCK_Q, fill: int = 0, axis: int = 1):
    """`[B, X, ...]` padded with `fill` and cut along `axis` into `[blocks, B, size, ...]`."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, blocks * size - x.shape[axis])
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)
