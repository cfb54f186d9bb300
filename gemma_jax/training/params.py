"""Pieces of a training loop over a model's parameters."""

from collections.abc import Callable
from functools import partial

from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.tree import ParamPath, flat_params, with_params

Params = dict[ParamPath, Weight]


def trainable(model: Gemma) -> tuple[Params, Callable[[Params], Gemma]]:
    """The parameters by path, and the way back: from such parameters to a model."""
    values = {path: param.get_value() for path, param in flat_params(model).items()}
    return values, partial(with_params, model)
