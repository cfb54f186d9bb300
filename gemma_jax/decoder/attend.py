"""Which attention kernel runs, and on which part of the operands a device runs it."""

from functools import partial

import jax
import jax.numpy as jnp

from gemma_jax.decoder.cache import KeysValues, LayerCache
from gemma_jax.runtime import Runtime
from gemma_jax.sharding import Partition
from gemma_kernels import decode_attention as decoding
from gemma_kernels.attention import IMPLEMENTATIONS, AttentionSpec, attention


def attend(
    q_BTNH: jax.Array,
    kv: KeysValues,
    mask: dict[str, jax.Array],
    spec: AttentionSpec,
    runtime: Runtime,
    *,
    full: bool,
) -> jax.Array:
    """The kernels for decoding if there are few queries and a cache, else those for prefill.

    A name that only the latter know (a library's) leaves the choice to the former. On a mesh every
    device attends with its own rows and heads; `full` says that the slots of keys may be split too.
    """
    decodes = not kv.in_order and q_BTNH.shape[1] <= decoding.MOST_TOKENS
    name, partition = runtime.attention_impl, runtime.partition
    if decodes and name in IMPLEMENTATIONS and name not in decoding.IMPLEMENTATIONS:
        name = "auto"
    across = partition is not None and full and partition.splits("S")
    if across and name == "auto":
        name = "xla"  # sums over the slots of other devices are for the compiler to arrange
    # Only kernels for decoding take a layer out of a stack, and int8.
    cache = kv.kv if decodes else LayerCache(*kv.kv.of_layer().widened(q_BTNH.dtype))
    stack = "" if cache.layer is None else "L"
    # All by their names, whose endings are their letters.
    dims = {name: stack + name.rpartition("_")[2] for name in cache.arrays}
    dims |= {name: name.rpartition("_")[2] for name in mask}
    dims |= {"layer": ""} if stack else {}
    arrays = cache.arrays | mask | ({"layer": cache.layer} if stack else {})

    def run(q_BTNH, *rest):
        operands = dict(zip(arrays, rest))
        keys_values = [operands.pop(x) for x in ("k_BKSH", "v_BKSH")]
        how = operands | dict(spec=spec, implementation=name)
        if decodes:
            return decoding.decode_attention(q_BTNH, *keys_values, **how)
        return attention(q_BTNH, *(jnp.moveaxis(x, 1, 2) for x in keys_values), **how)

    def run_part(q_BTNH, *rest):
        own = partial(_heads_of, partition, groups, q_BTNH)
        return run(
            q_BTNH,
            *(own(x, d.index("K")) if "K" in d else x for d, x in zip(dims.values(), rest)),
        )

    if partition is None or across:
        return run(q_BTNH, *arrays.values())
    groups = q_BTNH.shape[2] // cache.k_BKSH.shape[-3]
    operands = [("BTNH", q_BTNH), *((dims[x], array) for x, array in arrays.items())]
    return partition.run(run_part, "BTNH", *operands, whole="S")


def _heads_of(
    partition: Partition, groups: int, q_BTNH: jax.Array, x: jax.Array, axis: int
) -> jax.Array:
    """Of the key heads on this device, along an axis, those that its query heads read.

    They are all of them, unless key heads are too few to be split as query heads are.
    """
    N, K = q_BTNH.shape[2], x.shape[axis]
    count = max(1, N // groups)
    if count == K:
        return x
    first = partition.index("N") * N // groups
    return jax.lax.dynamic_slice_in_dim(x, first, count, axis)
