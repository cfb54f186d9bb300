"""Dimension letters -> mesh axes, from outside the model.

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = shard(model, mesh)

Layers know nothing of meshes. Weights and inputs are placed by their letters, and the compiler
carries the placement through the program (SPMD).
"""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_jax.cache import Cache, LayerCache
from gemma_jax.model import Gemma

# Heads, feed-forward width and vocabulary are split, so that each device holds whole heads and
# whole channels; activations stay whole in D. Rows of a batch go to the data axis.
INFERENCE: Mapping[str, str] = {
    "B": "data",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def letter_sharding(
    mesh: Mesh, dims: str, shape: tuple[int, ...], rules: Mapping[str, str] = INFERENCE
) -> NamedSharding:
    """Sharding of an array whose last axes are `dims`; axes in front (stacking) are not split.

    Letters without a rule, or whose axis the mesh does not have, are replicated. So are key/value
    heads (`K`) that do not divide: they are few, and every query head needs its own.

    Raises:
      ValueError: A size is no multiple of its mesh axis.
    """
    parts: list[str | None] = [None] * (len(shape) - len(dims))
    for letter, size in zip(dims, shape[len(parts) :]):
        axis = rules.get(letter)
        axis = axis if axis in mesh.axis_names else None
        if axis is not None and size % mesh.shape[axis]:
            if letter != "K":
                raise ValueError(
                    f"{letter}={size} cannot be split over mesh axis {axis!r} of size "
                    f"{mesh.shape[axis]}; use an axis that divides it, or drop the rule"
                )
            axis = None
        parts.append(axis)
    return NamedSharding(mesh, PartitionSpec(*parts))


def shard(model: Gemma, mesh: Mesh, rules: Mapping[str, str] = INFERENCE) -> Gemma:
    """The model with every parameter placed by its letters."""

    def place(param: nnx.Param) -> nnx.Param:
        array = param.get_value()
        sharding = letter_sharding(mesh, param.dims, array.shape, rules)
        return param.replace(jax.device_put(array, sharding))

    return jax.tree.map(place, model, is_leaf=lambda node: isinstance(node, nnx.Param))


def shard_cache(cache: Cache, mesh: Mesh, rules: Mapping[str, str] = INFERENCE) -> Cache:
    """The cache with rows and key/value heads placed by the same rules."""

    def place(node: LayerCache | jax.Array) -> LayerCache | jax.Array:
        dims = "BKSH" if isinstance(node, LayerCache) else "BS"
        return jax.tree.map(
            lambda a: jax.device_put(a, letter_sharding(mesh, dims, a.shape, rules)), node
        )

    return jax.tree.map(place, cache, is_leaf=lambda node: isinstance(node, LayerCache))
