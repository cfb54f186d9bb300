"""Attention in plain XLA, for any backend: query blocks, and for each only the keys it can see.

A block of queries meets its keys in tiles `[B, K, G, block_q, tile]`:

    decode, short prompts    one tile of all keys
    local layers             one tile of `block_q + window - 1` keys, cut out of the key axis
    global layers            tiles of `BLOCK_K` keys under a running softmax; tiles that hold no
                             visible key (later tokens, empty cache slots) cost a branch each

Without a mask (vision towers) heads come one by one, each with blocks of its queries against all
keys, `[B, block_q, S]`: on a CPU such a tile stays in cache, which makes it thrice as fast for a
SigLIP layer as a tile of all heads.

So local layers are linear in the length, no `[T, S]` array exists beyond a tile, and the backward
pass recomputes each query block instead of storing its tiles.
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
    if spec.window is not None and T + spec.window - 1 < S:
        span = T + spec.window - 1

        def windowed(q_BTKGH, lo_BT, hi_BT, offset):
            start = jnp.clip(offset - (spec.window - 1), 0, S - span)
            k, v = (lax.dynamic_slice_in_dim(x, start, span, 2) for x in (k_BKSH, v_BKSH))
            pos = lax.dynamic_slice_in_dim(kv_pos_BS, start, span, 1)
            return _one_tile(q_BTKGH, k, v, lo_BT, hi_BT, pos, spec)

        return windowed
    if T > 1 and S >= 2 * BLOCK_K:
        tiles = math.ceil(S / BLOCK_K)
        k_nBKSH, v_nBKSH = (_split(x, tiles, BLOCK_K, axis=2) for x in (k_BKSH, v_BKSH))
        pos_nBS = _split(kv_pos_BS, tiles, BLOCK_K, fill=-1)
        return lambda q_BTKGH, lo_BT, hi_BT, offset: _running_softmax(
            q_BTKGH, lo_BT, hi_BT, (k_nBKSH, v_nBKSH, pos_nBS), spec
        )
    return lambda q_BTKGH, lo_BT, hi_BT, offset: _one_tile(
        q_BTKGH, k_BKSH, v_BKSH, lo_BT, hi_BT, kv_pos_BS, spec
    )


def _one_tile(q_BTKGH, k_BKSH, v_BKSH, lo_BT, hi_BT, kv_pos_BS, spec):
    p_BKGTS, top_BKGT = _exp_scores(q_BTKGH, k_BKSH, lo_BT, hi_BT, kv_pos_BS, spec)
    total_BKGT = jnp.sum(p_BKGTS, axis=-1)
    return _normalise(_weigh(p_BKGTS, v_BKSH), total_BKGT, top_BKGT, q_BTKGH.dtype)


def _running_softmax(q_BTKGH, lo_BT, hi_BT, tiles, spec):
    B, T, K, G, H = q_BTKGH.shape
    first_B, last_B = jnp.min(jnp.where(hi_BT > lo_BT, lo_BT, 2**30), 1), jnp.max(hi_BT, 1)

    def tile(carry, xs):
        k_BKSH, v_BKSH, pos_BS = xs
        live = jnp.any((pos_BS >= first_B[:, None]) & (pos_BS < last_B[:, None]) & (pos_BS >= 0))

        def update(carry):
            top_BKGT, total_BKGT, sum_BTKGH = carry
            p_BKGTS, new_top = _exp_scores(q_BTKGH, k_BKSH, lo_BT, hi_BT, pos_BS, spec, top_BKGT)
            keep_BKGT = jnp.exp(top_BKGT - new_top)
            total_BKGT = total_BKGT * keep_BKGT + jnp.sum(p_BKGTS, axis=-1)
            keep_BTKG1 = jnp.moveaxis(keep_BKGT, 3, 1)[..., None]
            return new_top, total_BKGT, sum_BTKGH * keep_BTKG1 + _weigh(p_BKGTS, v_BKSH)

        return lax.cond(live, update, lambda carry: carry, carry), None

    start = (
        jnp.full((B, K, G, T), MASKED, jnp.float32),
        jnp.zeros((B, K, G, T), jnp.float32),
        jnp.zeros((B, T, K, G, H), jnp.float32),
    )
    (top_BKGT, total_BKGT, sum_BTKGH), _ = lax.scan(tile, start, tiles)
    return _normalise(sum_BTKGH, total_BKGT, top_BKGT, q_BTKGH.dtype)


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


def _exp_scores(q_BTKGH, k_BKSH, lo_BT, hi_BT, kv_pos_BS, spec, floor_BKGT=MASKED):
    """`exp(scores - top)` (0 where masked) and `top`, at least `floor_BKGT`."""
    s_BKGTS = spec.scale * jnp.einsum(
        "BTKGH,BKSH->BKGTS",
        q_BTKGH,
        k_BKSH,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    s_BKGTS = _cap(s_BKGTS, spec, q_BTKGH.dtype)
    seen_B11TS = visible(lo_BT, hi_BT, kv_pos_BS)[:, None, None]
    s_BKGTS = jnp.where(seen_B11TS, s_BKGTS, MASKED)
    top_BKGT = lax.stop_gradient(jnp.maximum(jnp.max(s_BKGTS, axis=-1), floor_BKGT))
    p_BKGTS = jnp.where(seen_B11TS, jnp.exp(s_BKGTS - top_BKGT[..., None]), 0.0)
    return p_BKGTS, top_BKGT


def _weigh(p_BKGTS, v_BKSH):
    return jnp.einsum(
        "BKGTS,BKSH->BTKGH",
        p_BKGTS.astype(v_BKSH.dtype),
        v_BKSH,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _normalise(sum_BTKGH, total_BKGT, top_BKGT, dtype):
    """Output, and the logarithm of the softmax's denominator; 0 and -inf where nothing is seen."""
    total_BTKG, top_BTKG = (jnp.moveaxis(x, 3, 1) for x in (total_BKGT, top_BKGT))
    none_BTKG = total_BTKG == 0
    safe_BTKG = jnp.where(none_BTKG, 1.0, total_BTKG)
    out_BTKGH = (sum_BTKGH / safe_BTKG[..., None]).astype(dtype)
    return out_BTKGH, jnp.where(none_BTKG, -jnp.inf, top_BTKG + jnp.log(safe_BTKG))


def _split(x, blocks: int, size: int = BLOCK_Q, fill: int = 0, axis: int = 1):
    """`[B, X, ...]` padded with `fill` and cut along `axis` into `[blocks, B, size, ...]`."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, blocks * size - x.shape[axis])
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)
