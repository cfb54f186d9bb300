"""Pieces of a training loop over a model's parameters."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from gemma_jax.model import Gemma

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


def muon(model: Gemma, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Muon on the linear maps of a model, Adam on all else, for what `trainable` returns."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return optax.contrib.muon(
        rate,
        muon_weight_dimension_numbers={path: _matrix(param) for path, param in flat},
        weight_decay=0.01,
        adam_weight_decay=0.01,
    )


def _matrix(param: nnx.Param) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are its rows and columns; `None` for what is no linear map."""
    inputs, dims = param.get_metadata().get("inputs", ""), param.get_metadata()["dims"]
    if not inputs or "V" in dims:
        return None
    ndim = param.get_value().ndim
    columns, first = ndim - len(inputs), ndim - len(dims)
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(columns, ndim)), output_axis=tuple(range(first, columns))
    )
