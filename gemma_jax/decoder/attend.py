"""Which attention kernel runs, and on which part of the operands a device runs it."""

from functools import partial

import jax
import jax.numpy as jnp

from gemma_jax.decoder.cache import KeysValues, LayerCache
from gemma_jax.runtime import Runtime
from gemma_jax.sharding import Partition
from gemma_jax.weights.contract import HIGHEST
from gemma_kernels import decode_attention as decoding
from gemma_kernels.attention import IMPLEMENTATIONS, AttentionSpec, Mask, attention

MASK_DIMS = Mask("BT", "BT", "BS")


def attend(
    q_BTNH: jax.Array,
    kv: KeysValues,
    mask: Mask | None,
    spec: AttentionSpec,
    runtime: Runtime,
    *,
    full: bool,
) -> jax.Array:
    """The kernels for decoding if there are few queries and a cache, else those for prefill.

    A name that only the latter know (a library's) leaves the choice to the former. On a mesh every
    device attends with its own rows and heads.

    Args:
      mask: `None` where the spec states it.
      full: Whether the slots of keys may be split over devices, too.
    """
    decodes = not kv.in_order and q_BTNH.shape[1] <= decoding.MOST_TOKENS
    name, partition = runtime.attention_impl, runtime.partition
    if decodes and name in IMPLEMENTATIONS and name not in decoding.IMPLEMENTATIONS:
        name = "auto"
    across = partition is not None and full and partition.splits("S")
    if across and name == "auto":
        name = "xla"  # sums over the slots of other devices are for the compiler to arrange
    run = partial(_decode if decodes else _prefill, spec=spec, implementation=name)
    # Only kernels for decoding take a layer out of a stack, and int8.
    cache = kv.kv if decodes else LayerCache(*kv.kv.of_layer().widened(q_BTNH.dtype))
    masks = () if mask is None else (mask,)
    if partition is None or across:
        return run(q_BTNH, cache, *masks)
    groups = q_BTNH.shape[2] // cache.k_BKSH.shape[-3]

    def run_part(q_BTNH: jax.Array, cache: LayerCache, *masks: Mask) -> jax.Array:
        return run(q_BTNH, _own_heads(partition, groups, q_BTNH, cache), *masks)

    operands = [("BTNH", q_BTNH), (cache.dims, cache), *((MASK_DIMS, mask) for mask in masks)]
    return partition.run(run_part, "BTNH", *operands, whole="S")


def weigh(weights_BNTS: jax.Array, kv: KeysValues, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Sums of values by given weights, `[B, T, N, H]`: what attention does after its softmax."""
    _, v_BKSH = kv.kv.of_layer().widened(jnp.float32)
    (B, N, T, S), K = weights_BNTS.shape, v_BKSH.shape[1]
    weights_BKGTS = weights_BNTS.reshape(B, K, N // K, T, S)
    out_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH, precision=HIGHEST)
    return out_BTKGH.reshape(B, T, N, -1).astype(dtype)


def _decode(q_BTNH: jax.Array, cache: LayerCache, mask: Mask, **options) -> jax.Array:
    return decoding.decode_attention(
        q_BTNH,
        cache.k_BKSH,
        cache.v_BKSH,
        **mask._asdict(),
        k_scale_BKS=cache.k_scale_BKS,
        v_scale_BKS=cache.v_scale_BKS,
        layer=cache.layer,
        **options,
    )


def _prefill(
    q_BTNH: jax.Array, cache: LayerCache, mask: Mask | None = None, **options
) -> jax.Array:
    k_BSKH, v_BSKH = (jnp.moveaxis(x_BKSH, 1, 2) for x_BKSH in (cache.k_BKSH, cache.v_BKSH))
    return attention(q_BTNH, k_BSKH, v_BSKH, **mask._asdict() if mask else {}, **options)


def _own_heads(
    partition: Partition, groups: int, q_BTNH: jax.Array, cache: LayerCache
) -> LayerCache:
    """Of the key heads on this device those that its query heads read.

    They are all of them, unless key heads are too few to be split as query heads are.
    """
    N, K = q_BTNH.shape[2], cache.k_BKSH.shape[-3]
    count = max(1, N // groups)
    if count == K:
        return cache
    first = partition.index("N") * N // groups

    def own(dims: str, x: jax.Array) -> jax.Array:
        if "K" not in dims:
            return x
        return jax.lax.dynamic_slice_in_dim(x, first, count, dims.index("K"))

    return jax.tree.map(own, cache.dims, cache)
