"""What a config says is trained, and how: of a model that is loaded, or of one that is planned."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import jax

from gemma_jax.adapters import without_adapters
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import layer_names
from gemma_jax.loading import LoadOptions
from gemma_jax.peft import lora
from gemma_jax.runs.config import RunConfig
from gemma_jax.sharding import TRAINING
from gemma_jax.storages import AUTO, STORED
from gemma_jax.training.model_pair import pair_with
from gemma_jax.training.objective_names import OBJECTIVES
from gemma_jax.training.placing import place_parts
from gemma_jax.training.step import Objective
from gemma_jax.training.trainable import Trainable, trainable
from gemma_jax.weights.tree import ParamPath, with_attributes


def load_options(config: RunConfig) -> LoadOptions:
    """How the models of a run are loaded, where the config does not say.

    On a mesh, by the rules for training. With layers in stacks, as one program for all of them
    compiles in a fraction of the time; but for blocks of files, which may differ from layer to
    layer, and for slices inside the model, which are cut out layer by layer.
    """
    options = config.load
    if options.mesh is not None and options.rules is None:
        options = replace(options, rules=TRAINING)
    in_layers = options.weights in (STORED, AUTO) or config.objective.get("submodels")
    if options.layout is None:
        options = replace(options, layout="unrolled" if in_layers else "scan")
    return options


def make_parts(
    config: RunConfig, model: Gemma, other: Callable[[], Gemma]
) -> tuple[Trainable, Objective, Gemma]:
    """What of a model is trained, the objective, and the model as it is trained.

    Args:
      model: Loaded, or with shapes in the place of arrays.
      other: Makes the second model, if the objective compares with one.

    Raises:
      ValueError: Names of parameters that there are not, or what cannot be trained.
    """
    if config.remat is not None:
        model = with_attributes(model, runtime=replace(model.runtime, remat=config.remat))
    if config.adapter is not None:
        parts = lora(model, config.adapter, jax.random.key(config.seed))
    else:
        parts = trainable(model, _where(model, config.frozen))
    if (partition := model.runtime.partition) is not None:
        parts = place_parts(parts, partition)
    kind = OBJECTIVES[config.objective["name"]].other
    if kind is None:
        return parts, config.make_objective(), model
    if config.reference is None:
        return parts, config.make_objective(reference=without_adapters), model
    return pair_with(parts, other()), config.make_objective(), model


def _where(model: Gemma, frozen: Sequence[str]) -> Callable[[ParamPath, Any], bool] | None:
    """What is trained: no parameter that a pattern of frozen ones fits."""
    if not frozen:
        return None
    unused = set(frozen)

    def where(path: ParamPath, param: Any) -> bool:
        names = [name for name, _ in layer_names(path, model)]
        fits = {p for p in frozen for name in names if fnmatchcase(name, p)}
        unused.difference_update(fits)
        return not fits

    trainable(model, where)
    if unused:
        raise ValueError(
            f"frozen: no parameter is called {', '.join(sorted(unused))}; names are such as "
            "vision.tower.* and blocks.0.attn.q.w"
        )
    return where
