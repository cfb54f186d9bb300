"""Several adapters beside one model, of which each row of a batch has its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.adapters import HEAD, TABLE, Adapter, adapt, untied
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import EMBEDDERS, layer_names
from gemma_jax.weights.adapted import Adapted, alike
from gemma_jax.weights.adapted_rows import AdaptedRows
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.tree import flat_params, with_params

BESIDE_ROWS = ("vision", "audio", EMBEDDERS)  # whose inputs are items, not rows of a batch


def hold(model: Gemma, adapters: Mapping[str, Adapter]) -> Gemma:
    """Makes a model with these adapters beside its weights, none of them chosen.

    Raises:
      ValueError: None are given; one holds whole parameters; the model has an adapter already.
    """
    if not adapters:
        raise ValueError("no adapters are given")
    for name, adapter in adapters.items():
        if adapter.whole:
            raise ValueError(
                f"adapter {name!r} holds whole parameters ({next(iter(adapter.whole))}), of which "
                "rows cannot have their own; load it alone"
            )
    if any(adapter.own_head or HEAD in adapter.factors for adapter in adapters.values()):
        if model.cfg.tied_head:
            adapters = {name: _for_both(adapter) for name, adapter in adapters.items()}
        model = untied(model)
    models = [adapt(model, Adapter(adapter.factors)) for adapter in adapters.values()]
    values = [{p: v.get_value() for p, v in flat_params(one).items()} for one in models]
    plain = flat_params(model)
    new = {}
    for path, param in plain.items():
        given = [one[path] for one in values]
        if any(isinstance(value, Adapted) for value in given):
            value = _joined(param.get_value(), given, tuple(adapters))
            new[path] = value
    model = with_params(model, new)
    if (partition := model.runtime.partition) is not None:
        model = partition.place(model)
    return model


def _for_both(adapter: Adapter) -> Adapter:
    """The adapter of an embedding that was the head's, too, for a head that is apart."""
    table = adapter.factors.get(TABLE)
    if adapter.own_head or table is None or HEAD in adapter.factors:
        return adapter
    return replace(adapter, factors={**adapter.factors, HEAD: table})


def _joined(base: Weight, given: list[Weight], names: tuple[str, ...]) -> AdaptedRows:
    first = next(value for value in given if isinstance(value, Adapted))
    nothing = replace(first, **jax.tree.map(jnp.zeros_like, _factors(first)))
    nothing = nothing if first.gain is None else replace(nothing, gain=jnp.ones_like(first.gain))
    rows = [v if isinstance(v, Adapted) else nothing for v in (nothing, *given)]
    behind = first.scale.ndim  # axes for stacking come first
    arrays = {
        name: jnp.stack([getattr(row, name) for row in alike(rows)], axis=behind)
        for name in ("a", "b", "scale", "gain")
        if any(getattr(row, name) is not None for row in rows)
    }
    chosen = jnp.zeros((*first.scale.shape, 1), jnp.int32)
    return AdaptedRows(base, chosen_B=chosen, names=names, **arrays)


def _factors(weight: Adapted) -> dict[str, jax.Array]:
    return {"a": weight.a, "b": weight.b, "scale": weight.scale}


def choose_adapters(model: Gemma, chosen: str | Sequence[str | None] | None) -> Gemma:
    """Chooses the adapter of every row of a batch, out of those that the model holds.

    The result runs in the programs of any other choice for as many rows. Rows give what each gives
    with its adapter alone.

    Args:
      model: Of `with_adapters`.
      chosen: A name, or `None` for the model as it is without, for all rows; or one for each.

    Raises:
      ValueError: A name that the model does not hold; a choice by row in a model with adapters in a
        tower, whose images and sounds are no rows.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",))
      >>> trained, frozen, join = gj.lora(model, gj.Lora(rank=2))
      >>> held = gj.with_adapters(model, {"one": join(trained, frozen)})
      >>> mixed = gj.choose_adapters(held, ["one", None])
      >>> gj.forward(mixed, [[2, 5, 7], [2, 5, 9]]).logits.shape
      (2, 3, 359)
    """
    params = flat_params(model).items()
    held = {p: v.get_value() for p, v in params if isinstance(v.get_value(), AdaptedRows)}
    if not held:
        raise ValueError("the model holds no adapters; with_adapters puts some beside it")
    names = next(iter(held.values())).names
    each = [chosen] if chosen is None or isinstance(chosen, str) else list(chosen)
    if unknown := [name for name in each if name is not None and name not in names]:
        raise ValueError(f"no adapter {unknown[0]!r}; the model holds {', '.join(names)}")
    beside = [path for path in held if path[0] in BESIDE_ROWS]
    if len(each) > 1 and beside:
        raise ValueError(
            f"{next(layer_names(beside[0], model))[0]} has adapters, and reads items rather than "
            "rows: choose one adapter for all rows"
        )
    numbers = np.array([0 if name is None else 1 + names.index(name) for name in each], np.int32)
    return with_params(model, {path: _choose(v, numbers) for path, v in held.items()})


def _choose(value: AdaptedRows, numbers: np.ndarray) -> AdaptedRows:
    stacked = value.scale.shape[:-1]
    return replace(value, chosen_B=jnp.broadcast_to(numbers, (*stacked, len(numbers))))


def held_adapters(model: Gemma) -> tuple[str, ...]:
    """Names of the adapters that a model holds."""
    values = (param.get_value() for param in flat_params(model).values())
    return next((value.names for value in values if isinstance(value, AdaptedRows)), ())
