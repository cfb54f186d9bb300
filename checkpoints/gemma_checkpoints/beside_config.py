"""What a model is and its config does not say: modules, attributes and parameters of its own.

A model of `Gemma(cfg)` has none; one of `Gemma(cfg, block=...)` has, and one that was changed after
it was made. No format can say it: `save_hf` refuses such models, an Orbax folder notes what `block`
made, a line each, and the lines are compared when it is loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from inspect import isfunction
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Block, Gemma, MakeBlock, abstract_model
from gemma_jax.decoder.names import layer_names

from .errors import CheckpointError, by_layer
from .params import named_slots
from .source import Source
from .written_values import NAMELESS, written

OURS, MISSING = "gemma_jax", "is missing"
# How a model computes, how its layers are stacked; and what is compared by what it made.
_NOT_COMPARED = ("runtime", "layer_groups", "make_block", "_length")


def beside_config(model: Gemma) -> tuple[str, ...]:
    """Facts of a model that its config does not say, a line each; its values are not looked at."""
    plain = abstract_model(model.cfg)
    modules = dict(_modules(model, plain))
    lines = [*modules.values(), *_attributes(model, plain), *_states(model)]
    for name, line in _params(model, plain):
        inside = any(name.startswith(f"{module}.") for module in modules)
        lines += [] if inside and line.endswith(MISSING) else [line]
    return tuple(sorted(lines))


def refuse_beside_config(target: Path, model: Gemma) -> None:
    """Raises `CheckpointError` for a model that is more than its config."""
    if lines := beside_config(model):
        raise CheckpointError(target, _problems(lines))


def noted_beside_config(target: Path, model: Gemma) -> tuple[str, ...]:
    """What has to be noted beside the config of a model that is saved.

    Raises:
      CheckpointError: The model is not what `Gemma(cfg, block=...)` makes, but was changed later;
        or its modules keep functions that have no name to compare them by.
    """
    lines = beside_config(model)
    if nameless := [line for line in lines if NAMELESS in line]:
        raise CheckpointError(target, _problems(nameless))
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
    if block is Block:  # which is how the command line comes here
        hint = "only Python can give the block that made them: gemma_jax.load(..., block=...)"
    elif noted:
        hint = "give the one that made them: gemma_jax.load(..., block=...)"
    else:
        hint = "leave `block` out"
    raise CheckpointError(source.path, f"{problem}; {hint}")


def _modules(model: Gemma, plain: Gemma) -> Iterator[tuple[str, str]]:
    """Modules that are of another class than usual, or new, or have other code, by name."""
    expected = dict(_named_modules(plain))
    for name, module in _named_modules(model):
        kind, usual = type(module), type(expected.get(name))
        if name not in expected and _package(kind) != OURS:
            yield name, f"{name} is {kind.__name__}"
        elif name in expected and kind is not usual:
            yield name, f"{name} is {kind.__name__}, not {usual.__name__}"
        elif name in expected and not _has_our_code(kind):
            yield name, f"{name} is {kind.__name__} with other code"


def _attributes(model: Gemma, plain: Gemma) -> Iterator[str]:
    """All of modules of the usual classes; of a user's own classes, what can be written down.

    The layers of an `nnx.Sequential` lie in a list, and may be functions.
    """
    expected = dict(_named_modules(plain, lists=True))
    for name, module in _named_modules(model, lists=True):
        other = expected.get(name)
        own = _package(type(module)) not in (OURS, "flax") or isinstance(module, nnx.List)
        for key, value in _static(module).items():
            if type(other) is type(module):
                yield from _differing(f"{name}.{key}", value, getattr(other, key, None))
            elif own and (shown := written(value)):
                if not hasattr(other, key) or getattr(other, key) != value:
                    yield f"attribute {name}.{key} is {shown}"


def _differing(name: str, found: Any, said: Any) -> Iterator[str]:
    if found == said:
        return
    if is_dataclass(found) and type(found) is type(said):
        for field in fields(found):
            values = (getattr(one, field.name) for one in (found, said))
            yield from _differing(f"{name}.{field.name}", *values)
    else:
        said = type(said).__name__ if isinstance(said, nnx.Module) else repr(said)
        yield f"attribute {name} is {found!r}, not {said}"


def _params(model: Gemma, plain: Gemma) -> Iterator[tuple[str, str]]:
    slots, expected = named_slots(model), named_slots(plain)
    for name, slot in slots.items():
        if name not in expected:
            yield name, f"parameter {name} has no place in this format"
        elif slot.shape != (shape := expected[name].shape):
            yield name, f"parameter {name} has shape {list(slot.shape)}, not {list(shape)}"
    yield from ((n, f"parameter {n} {MISSING}") for n in expected if n not in slots)


def _states(model: Gemma) -> Iterator[str]:
    """Of random numbers, of batch norms: nothing of this is kept."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Param):
            for name, _ in layer_names(path, model):
                yield f"{name} is a {type(variable).__name__}, and only parameters are saved"


def _named_modules(model: Gemma, lists: bool = False) -> Iterator[tuple[str, nnx.Module]]:
    """By names that do not depend on how layers are stacked; if asked, also lists inside layers."""
    for path, module in nnx.iter_modules(model):
        for name, row in layer_names(path, model):
            if not isinstance(module, nnx.List) or (lists and row is not None):
                yield name, module


def _static(module: nnx.Module) -> dict[str, Any]:
    """Attributes that are neither arrays nor modules."""
    inside = (nnx.Pytree, nnx.Variable, jax.Array, jax.ShapeDtypeStruct)
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_pytree__")
        and key not in _NOT_COMPARED
        and not isinstance(value, inside)
    }


def _package(kind: Any) -> str:
    return kind.__module__.split(".")[0]


def _has_our_code(kind: type) -> bool:
    """Whether a class and its functions are as this project wrote them."""
    functions = [value for value in vars(kind).values() if isfunction(value)]
    return all(_package(one) == OURS for one in (kind, *functions))


def _problems(lines: Iterable[str]) -> list[str]:
    return [f"{line}: {_hint(line)}" for line in by_layer(lines)]


def _hint(line: str) -> str:
    return NAME_IT if NAMELESS in line else _HINTS.get(line.split()[0], OTHERWISE)


NAME_IT = "keep one that is defined at the top of a module, or make it a method of the class"
OTHERWISE = "no config says so; save_orbax keeps what Gemma(cfg, block=...) makes"
_HINTS = {
    "parameter": "merge it first, or make the model with Gemma(cfg, block=...) and use save_orbax",
    "attribute": "give another config when the model is made or loaded, in place of changing it",
}


def _some(lines: Iterable[str]) -> str:
    return "; ".join(by_layer(lines)[:2])
