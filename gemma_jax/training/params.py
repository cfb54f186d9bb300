"""Pieces of a training loop over a model's parameters."""

from collections.abc import Callable

import jax
from flax import nnx

from gemma_jax.decoder.model import Gemma

Params = dict[tuple[str | int, ...], jax.Array]


def trainable(model: Gemma) -> tuple[Params, Callable[[Params], Gemma]]:
    """The parameters by path, and the way back: from such parameters to a model."""
    graph, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)

    def rebuild(params: Params) -> Gemma:
        return nnx.merge(
            graph, nnx.from_flat_state([(path, p.replace(params[path])) for path, p in flat])
        )

    return {path: param.get_value() for path, param in flat}, rebuild
