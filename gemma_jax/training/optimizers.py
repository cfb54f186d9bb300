"""Optimizers that know which parameters are linear maps."""

from typing import Any

import optax
from flax import nnx

from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.tree import ParamPath, flat_params


def muon(model: Gemma, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Makes Muon for the linear maps of a model and Adam for all else.

    Args:
      model: What `trainable` is asked about; any part of it may be trained.
      rate: Of both.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits")
      >>> trained, frozen, join = gj.trainable(model, lambda path, param: "attn" in path)
      >>> moments = gj.muon(model, 1e-3).init(trained)
    """
    matrices = {path: _matrix(param) for path, param in flat_params(model).items()}

    def of_what_is_trained(trained: Any) -> dict[ParamPath, Any]:
        return {path: matrices[path] for path in trained}

    return optax.contrib.muon(
        rate,
        muon_weight_dimension_numbers=of_what_is_trained,
        weight_decay=0.01,
        adam_weight_decay=0.01,
    )


def _matrix(param: nnx.Param) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are its rows and columns; `None` for what is no linear map."""
    inputs, dims = (param.get_metadata().get(name, "") for name in ("inputs", "dims"))
    if not inputs or "V" in dims:
        return None
    ndim = len(param.get_value().shape)
    columns, first = ndim - len(inputs), ndim - len(dims)
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(columns, ndim)), output_axis=tuple(range(first, columns))
    )
