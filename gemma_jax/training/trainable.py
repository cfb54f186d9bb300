"""Splits a model into the parameters that are trained and those that stay as they are.

    trained, frozen, join = trainable(model, lambda path, param: "vision" not in path)
    model = join(trained, frozen)

Both parts are arguments of whatever is compiled, so that no weight becomes a constant of a program;
`join` holds the shape of the model and none of its arrays. A step asks for nothing but this triple:
adapters, or a model with some of its layers missing, are other functions that return one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.tree import ParamPath, flat_params, with_params

Params = dict[ParamPath, jax.Array]


class Trainable(NamedTuple):
    """Holds the parts of a model, and the way back.

    Attributes:
      trained: Path -> array: what an optimizer moves.
      frozen: Path -> array, or what stands in the place of one.
      join: `(trained, frozen) -> model`, of arrays like these.
    """

    trained: Params
    frozen: dict[ParamPath, Weight]
    join: Callable[[Params, Any], Gemma]


def trainable(
    model: Gemma, where: Callable[[ParamPath, nnx.Param], bool] | None = None
) -> Trainable:
    """Splits a model into the parameters that are trained, those that are frozen, and the way back.

    Args:
      where: Says of a parameter, by its path and itself, whether it is trained; default: all are.

    Raises:
      ValueError: Nothing is chosen, or something without gradients, such as an int8 weight.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits")
      >>> trained, frozen, join = gj.trainable(model, lambda path, param: "vision" not in path)
      >>> len(trained), len(frozen)
      (41, 55)
      >>> gj.trainable(join(trained, frozen)).trained.keys() == trained.keys() | frozen.keys()
      True
    """
    params = flat_params(model)
    trained = {p: v.get_value() for p, v in params.items() if where is None or where(p, v)}
    if not trained:
        raise ValueError(
            f"`where` chose none of the {len(params)} parameters, whose paths are such as "
            f"{_name(next(iter(params)))}; `gemma_jax.weights.tree.flat_params` lists them"
        )
    for path, value in trained.items():
        if not (isinstance(value, _ARRAYS) and jnp.issubdtype(value.dtype, jnp.floating)):
            kind = value.dtype if isinstance(value, _ARRAYS) else type(value).__name__
            raise ValueError(
                f"{kind} {_name(path)} has no gradient: leave it frozen by `where`, or load the "
                'model with weights="float32"'
            )
    frozen = {p: v.get_value() for p, v in params.items() if p not in trained}
    hollow = with_params(model, dict.fromkeys(params))
    return Trainable(trained, frozen, partial(_join, hollow))


_ARRAYS = (jax.Array, jax.ShapeDtypeStruct)  # the latter in models that are only planned


def _join(hollow: Gemma, trained: Params, frozen: Any) -> Gemma:
    return with_params(hollow, {**frozen, **trained})


def _name(path: ParamPath) -> str:
    return ".".join(map(str, path))
