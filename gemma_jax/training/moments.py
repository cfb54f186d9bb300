"""Where an optimizer's state lies: beside the parameters that it is about."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gemma_jax.training.trainable import Params


def placed_like(moments: Any, trained: Params, whole: jax.sharding.Sharding) -> Any:
    """Gives an optimizer's state, of shapes, the shardings of what is trained.

    An array of the entries of the parameter under whose path it stands lies as that does, also if
    several axes are one in it (Muon's matrices); anything else (a count, Adafactor's sums of rows)
    is small, and whole on every device.

    Args:
      moments, trained: `jax.ShapeDtypeStruct` in the place of arrays.
    """

    def placed(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        about = next((trained[key] for key in reversed(keys) if key in trained), None)
        return leaf.update(sharding=whole if about is None else _like(about, leaf.shape) or whole)

    return jax.tree_util.tree_map_with_path(placed, moments)


def _like(about: Any, shape: Sequence[int]) -> jax.sharding.Sharding | None:
    """The sharding of an array in another shape; `None` if it has other entries."""
    if about.shape == shape or not isinstance(about.sharding, NamedSharding):
        return about.sharding if about.shape == shape else None
    spec = [*about.sharding.spec, *[None] * len(about.shape)]
    left, parts = list(zip(about.shape, spec)), []
    for size in shape:
        group = []
        while left and math.prod(n for n, _ in group) < size:
            group.append(left.pop(0))
        if math.prod(n for n, _ in group) != size:
            return None
        (first, *rest) = [axes for _, axes in group] or [None]
        # Parts of the first of several axes are parts of all of them as one; others are not.
        parts.append(None if any(rest) else first)
    if left:
        return None
    return NamedSharding(about.sharding.mesh, PartitionSpec(*parts))
