"""A decoding step in plain XLA, for any backend.

Query heads and new tokens that share a key head are rows of one matrix, `[B, K, rows, H]`; heads
and batch are batch dimensions of both products, as the cache has them, so nothing is transposed.
Scales of an int8 cache act on the scores and on the weights, not on the cache.

On a CPU a long cache is read in blocks of slots, and those without a key that a query sees are not
read at all: most of a cache waits for tokens to come.

Local letters: R rows: query heads and new tokens of a key head; X anything.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from gemma_kernels.attention.mask import visible
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.platform import target_platform

BLOCK, SMALLEST = 512, 128  # slots that are read together on a CPU
MASKED = -1e30  # below any score; finite, so that a row without keys gives 0 and not nan

# Of the keys seen so far: the highest score, the sum of `exp(score - top)`, and of the values so
# weighted.
Sums = tuple[jax.Array, jax.Array, jax.Array]


def decode_attention_xla(
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
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Same results as `reference.decode_attention_reference`."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKRH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)

    def over(first: int | jax.Array, count: int) -> Sums:
        """What so many slots add."""

        def cut(x: jax.Array | None, axis: int) -> jax.Array | None:
            if x is None or count == S:
                return x
            return lax.dynamic_slice_in_dim(x, first, count, axis)

        k_scale, v_scale = cut(k_scale_BKS, 2), cut(v_scale_BKS, 2)
        seen_BTS = visible(lo_BT, hi_BT, cut(kv_pos_BS, 1))
        return _sums(q_BKRH, cut(k_BKSH, 2), cut(v_BKSH, 2), k_scale, v_scale, seen_BTS, spec)

    size = math.gcd(S, BLOCK)
    if S >= 2 * BLOCK and size >= SMALLEST and target_platform() == "cpu":
        seen_BT, blocks = hi_BT > lo_BT, S // size
        first = jnp.min(jnp.where(seen_BT, lo_BT, 2**30))
        seen_S = jnp.any((kv_pos_BS >= first) & (kv_pos_BS < jnp.max(hi_BT)) & (kv_pos_BS >= 0), 0)
        live = jnp.any(seen_S.reshape(blocks, size), axis=1)

        def block(sums: Sums, i: jax.Array) -> tuple[Sums, None]:
            def more(sums: Sums) -> Sums:
                return _joined(sums, over(i * size, size))

            return lax.cond(live[i], more, lambda sums: sums, sums), None

        none_BKR1 = jnp.zeros((*q_BKRH.shape[:3], 1), jnp.float32)
        start = (none_BKR1 + MASKED, none_BKR1, jnp.zeros(q_BKRH.shape, jnp.float32))
        sums, _ = lax.scan(block, start, jnp.arange(blocks))
    else:
        sums = over(0, S)
    top_BKR1, total_BKR1, sum_BKRH = sums
    some_BKR1 = total_BKR1 > 0
    safe_BKR1 = jnp.where(some_BKR1, total_BKR1, 1.0)

    def in_order(x_BKRX: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BKRX.reshape(B, K, N // K, T, -1), 3, 1).reshape(B, T, N, -1)

    out_BTNH = in_order((sum_BKRH / safe_BKR1).astype(q_BTNH.dtype))
    if not return_lse:
        return out_BTNH
    lse_BKR1 = jnp.where(some_BKR1, top_BKR1 + jnp.log(safe_BKR1), -jnp.inf)
    return out_BTNH, in_order(lse_BKR1)[..., 0]


def _sums(
    q_BKRH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    k_scale_BKS: jax.Array | None,
    v_scale_BKS: jax.Array | None,
    seen_BTS: jax.Array,
    spec: AttentionSpec,
) -> Sums:
    scaled = k_scale_BKS is not None
    dtype = q_BKRH.dtype if scaled else jnp.promote_types(q_BKRH.dtype, k_BKSH.dtype)
    s_BKRS = _batched("RH,SH->RS", q_BKRH.astype(dtype), k_BKSH.astype(dtype))
    s_BKRS = s_BKRS * (spec.scale if not scaled else spec.scale * k_scale_BKS[:, :, None])
    if not spec.softmax_in_float32:
        s_BKRS = s_BKRS.astype(q_BKRH.dtype).astype(jnp.float32)
    if spec.soft_cap is not None:
        s_BKRS = spec.soft_cap * jnp.tanh(s_BKRS / spec.soft_cap)
    groups = q_BKRH.shape[2] // seen_BTS.shape[1]
    seen_B1RS = jnp.tile(seen_BTS, (1, groups, 1))[:, None]
    s_BKRS = jnp.where(seen_B1RS, s_BKRS, MASKED)
    top_BKR1 = lax.stop_gradient(jnp.max(s_BKRS, axis=-1, keepdims=True))
    p_BKRS = jnp.where(seen_B1RS, jnp.exp(s_BKRS - top_BKR1), 0.0)
    total_BKR1 = jnp.sum(p_BKRS, axis=-1, keepdims=True)
    if v_scale_BKS is not None:
        p_BKRS = p_BKRS * v_scale_BKS[:, :, None]
    return top_BKR1, total_BKR1, _batched("RS,SH->RH", p_BKRS.astype(dtype), v_BKSH.astype(dtype))


def _joined(a: Sums, b: Sums) -> Sums:
    """Those of both, relative to the larger top."""
    top_BKR1 = jnp.maximum(a[0], b[0])
    of_a, of_b = jnp.exp(a[0] - top_BKR1), jnp.exp(b[0] - top_BKR1)
    return top_BKR1, a[1] * of_a + b[1] * of_b, a[2] * of_a + b[2] * of_b


def _batched(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two batches of matrices `[B, K, ...]`, in float32.

    Its operands have no axes of size 1: XLA's CPU backend would take them out, and copy a cache
    that is written in one shape and multiplied in another.
    """
    unit = [axis for axis in (0, 1) if b.shape[axis] == 1]
    kept = "".join(letter for axis, letter in enumerate("BK") if axis not in unit)
    left, right, result = equation.replace("->", ",").split(",")
    out = jnp.einsum(
        f"{kept}{left},{kept}{right}->{kept}{result}",
        a.squeeze(unit),
        b.squeeze(unit),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.expand_dims(out, unit)
