"""Where an optimizer's state lies: beside the parameters that it is about."""

from typing import Any

import jax

from gemma_jax.training.trainable import Params


def placed_like(moments: Any, trained: Params, whole: jax.sharding.Sharding) -> Any:
    """Gives an optimizer's state, of shapes, the shardings of what is trained.

    An array in the shape of the parameter under whose path it stands lies as that does; anything
    else (a count, Adafactor's sums of rows) is small, and whole on every device.

    Args:
      moments, trained: `jax.ShapeDtypeStruct` in the place of arrays.
    """

    def placed(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        about = next((trained[key] for key in reversed(keys) if key in trained), None)
        same = about is not None and about.shape == leaf.shape
        return leaf.update(sharding=about.sharding if same else whole)

    return jax.tree_util.tree_map_with_path(placed, moments)
