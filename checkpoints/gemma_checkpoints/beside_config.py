"""What a model is and its config does not say: modules, attributes and parameters of its own.

A model of `Gemma(cfg)` has none; one of `Gemma(cfg, block=...)` has, and one that was changed after
it was made. No format can say it: `save_hf` refuses such models, an Orbax folder notes what `block`
made, a line each, and the lines are compared when it is loaded.
"""

import re
from collections.abc import Iterable, Iterator
from inspect import isfunction
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Block, Gemma, MakeBlock, abstract_model

from .errors import CheckpointError
from .params import layer_names, named_slots
from .source import Source

NO_PLACE = "has no place in this format"
# How a model computes, how its layers are stacked; and what is compared by what it made.
_NOT_COMPARED = ("runtime", "layer_groups", "make_block")


def beside_config(model: Gemma) -> tuple[str, ...]:
    """Facts of a model that its config does not say, a line each; its values are not looked at."""
    plain = abstract_model(model.cfg)
    return tuple(sorted([*_modules(model, plain), *_params(model, plain), *_states(model)]))


def refuse_beside_config(target: Path, model: Gemma) -> None:
    """Raises `CheckpointError` for a model that is more than its config."""
    if lines := beside_config(model):
        raise CheckpointError(target, _problems(lines))


def noted_beside_config(target: Path, model: Gemma) -> tuple[str, ...]:
    """What has to be noted beside the config of a model that is saved.

    Raises:
      CheckpointError: The model is not what `Gemma(cfg, block=...)` makes, but was changed later.
    """
    lines = beside_config(model)
    made: tuple[str, ...] = ()
    if model.make_block is not Block:
        made = beside_config(abstract_model(model.cfg, block=model.make_block))
    if changed := [line for line in lines if line not in made]:
        raise CheckpointError(target, _problems(changed))
    return lines


def check_block(source: Source, cfg: GemmaConfig, block: MakeBlock = Block) -> None:
    """Holds what `block` makes against what was noted when the source was saved.

    Args:
      cfg: As the source declares it, or the part of it that is wanted.

    Raises:
      CheckpointError: They are not the same.
    """
    noted = source.beside_config
    if noted is None or (not noted and block is Block):
        return
    found = beside_config(abstract_model(cfg, block=block))
    if noted == found:
        return
    if block is Block:
        problem = f"it was saved with blocks of its own ({_some(noted)})"
    else:
        odd = [line for line in noted if line not in found] or found
        problem = f"it was saved with other blocks than `block` makes ({_some(odd)})"
    hint = "give the one that made them" if noted else "leave `block` out"
    raise CheckpointError(source.path, f"{problem}; {hint}: gemma_jax.load(..., block=...)")


def _modules(model: Gemma, plain: Gemma) -> Iterator[str]:
    expected = dict(_named_modules(plain))
    for name, module in _named_modules(model):
        kind, other = type(module), expected.get(name)
        if other is None:
            yield f"{name} is a {kind.__name__}"
        elif kind is not type(other):
            yield f"{name} is a {kind.__name__}, not a {type(other).__name__}"
        elif not _is_ours(kind):
            yield f"{name} is a {kind.__name__} with other code"
        else:
            for key, value in _static(module).items():
                if value != (said := getattr(other, key, None)):
                    yield f"{name}.{key} is {value!r}, not {said!r}"


def _params(model: Gemma, plain: Gemma) -> Iterator[str]:
    slots, expected = named_slots(model), named_slots(plain)
    for name, slot in slots.items():
        if name not in expected:
            yield f"parameter {name} {NO_PLACE}"
        elif slot.shape != (shape := expected[name].shape):
            yield f"parameter {name} has shape {list(slot.shape)}, not {list(shape)}"
    yield from (f"parameter {name} is missing" for name in expected if name not in slots)


def _states(model: Gemma) -> Iterator[str]:
    """Of random numbers, of batch norms: nothing of this is kept."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Param):
            for name, _ in layer_names(path, model):
                yield f"{name} is a {type(variable).__name__}, and only parameters are saved"


def _named_modules(model: Gemma) -> Iterator[tuple[str, nnx.Module]]:
    """By names that do not depend on how layers are stacked; lists of modules are left out."""
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, nnx.List):
            for name, _ in layer_names(path, model):
                yield name, module


def _static(module: nnx.Module) -> dict[str, Any]:
    """Attributes that are neither arrays nor modules."""
    inside = (nnx.Pytree, nnx.Variable, jax.Array, jax.ShapeDtypeStruct)
    return {
        key: value
        for key, value in vars(module).items()
        if key[0] != "_" and key not in _NOT_COMPARED and not isinstance(value, inside)
    }


def _is_ours(kind: type) -> bool:
    """Whether a class and its functions are as this project wrote them."""
    functions = [value for value in vars(kind).values() if isfunction(value)]
    return all(one.__module__.split(".")[0] == "gemma_jax" for one in (kind, *functions))


def _problems(lines: Iterable[str]) -> list[str]:
    return [f"{line}: {_MERGE if NO_PLACE in line else _SAVE}" for line in _grouped(lines)]


_MERGE = "merge it first, or make the model with Gemma(cfg, block=...) and use save_orbax"
_SAVE = "no config says so; save_orbax keeps what Gemma(cfg, block=...) makes"


def _some(lines: Iterable[str]) -> str:
    return "; ".join(_grouped(lines)[:2])


def _grouped(lines: Iterable[str]) -> list[str]:
    """Lines that differ in their layer alone become one, with their number."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"blocks\.\d+", "blocks", line), []).append(line)
    return [
        first + (f" (and {len(more)} more layers)" if more else "")
        for first, *more in groups.values()
    ]
