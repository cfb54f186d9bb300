"""Takes the parameters out of a model by path, and makes models with other ones."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import nnx

ParamPath = tuple[Any, ...]  # attributes and places in lists, from the model to the Param
Model = TypeVar("Model", bound=nnx.Module)


def flat_params(model: nnx.Module) -> dict[ParamPath, nnx.Param]:
    """Lists the parameters of a model by path."""
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def dims_of(param: nnx.Param) -> str:
    """The letters of a parameter's last axes; none, where a module of a user's own gave none."""
    return param.get_metadata().get("dims", "")


def with_params(model: Model, values: Mapping[ParamPath, Any]) -> Model:
    """Makes a model with other values in some of its parameters; it shares all else.

    Args:
      values: Path -> array, or what stands in the place of one (see `weights.protocol`).

    Raises:
      ValueError: A path that the model does not have.
    """
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    if unknown := [path for path in values if path not in flat]:
        names = ", ".join(".".join(map(str, path)) for path in unknown[:4])
        raise ValueError(f"the model has no parameter {names}; `flat_params` lists those it has")
    flat |= {path: flat[path].replace(value) for path, value in values.items()}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def map_params(
    model: Model,
    function: Callable[[nnx.Param], Any],
    where: Callable[[ParamPath, nnx.Param], bool] = lambda path, param: True,
) -> Model:
    """Makes a model with `function(param)` as the value of each parameter, or of those `where`."""
    params = flat_params(model).items()
    return with_params(
        model, {path: function(param) for path, param in params if where(path, param)}
    )


def with_attributes(model: Model, **attributes: Any) -> Model:
    """Makes a model with other attributes (`runtime`, `cfg`); it shares the arrays of this one."""
    model = nnx.merge(*nnx.split(model))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model
