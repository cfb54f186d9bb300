"""Models and caches on a mesh.

mesh = make_mesh(model.cfg, tensor=4, data=2)
model = shard(model, mesh)            # or load_model(..., mesh=mesh): straight into the shards
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_jax.decoder.cache import Cache, init_cache
from gemma_jax.decoder.model import Gemma
from gemma_jax.sharding import Partition, Rules
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.tree import with_attributes


def shard(model: Gemma, mesh: Mesh, rules: Rules | None = None) -> Gemma:
    """The model with every parameter placed by its letters, and caches to be placed so too.

    Args:
      rules: Which letters are split over which axes; default: `serving_rules`.

    Raises:
      ValueError: A size that its mesh axes do not divide, or an axis that no rule uses.
    """
    partition = Partition.of(mesh, rules)
    return with_partition(partition.place(model), partition)


def empty_cache(model: Gemma, batch: int, max_len: int, slack: int = 0) -> Cache:
    """`init_cache` for a model, in the dtype of its caches, made where the model lies."""
    runtime = model.runtime
    partition = runtime.partition
    make = partial(
        init_cache, model.cfg, model.layer_groups, batch, max_len, runtime.kv_dtype, slack
    )
    if partition is None:
        return make()
    return jax.jit(make, out_shardings=partition.shardings(jax.eval_shape(make)))()


def with_partition(model: Gemma, partition: Partition | None) -> Gemma:
    """The model, whose arrays lie where `partition` says, computing there."""

    def spread(node: Any) -> Any:
        return replace(node, partition=partition) if isinstance(node, QuantizedWeight) else node

    model = jax.tree.map(spread, model, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    return with_attributes(model, runtime=replace(model.runtime, partition=partition))
