"""A second model beside the one that is trained: a reference, or a teacher.

    parts = pair_with(trainable(model), reference)
    init, step = make_step(dpo, optimizer, parts.join)
    state, metrics = step(state, parts.frozen, batch)  # the reference travels in `frozen`
    model = parts.join(state.trained, parts.frozen).model

So its arrays are arguments of the compiled program as all frozen ones are, never constants of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from gemma_jax.decoder.model import Gemma
from gemma_jax.training.trainable import Params, Trainable


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelPair:
    """Holds the model that is trained, and another, which is not.

    Attributes:
      model: Is trained.
      other: Is compared with; no gradient goes through it.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",))
      >>> gj.ModelPair(model, model).other is model
      True
    """

    model: Gemma
    other: Gemma

    def map(self, change: Callable[[Gemma], Gemma]) -> "ModelPair":
        """The pair with another model in the place of the one that is trained."""
        return replace(self, model=change(self.model))


def pair_with(parts: Trainable, other: Gemma) -> Trainable:
    """Makes the parts of a `ModelPair` out of those of a model, for objectives that compare two.

    Args:
      parts: What `trainable` returns, or adapters.
      other: The reference, or the teacher; of any shape, stored in any form. It may share arrays
        with `parts`, but not with a state that is donated.

    Returns:
      The same, with both in `frozen`; `join` gives a `ModelPair`.

    Examples:
      >>> import gemma_jax as gj
      >>> import jax
      >>> import numpy as np
      >>> import optax
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",), layout="scan")
      >>> trained, frozen, join = gj.pair_with(gj.trainable(model), model)
      >>> init, step = gj.make_step(gj.distill, optax.sgd(0.1), join)
      >>> state = init(trained, jax.random.key(0))
      >>> state, metrics = step(state, frozen, np.array([[2, 5, 7]]))
      >>> print(f"{metrics['loss']:.2f}")  # from itself
      0.00
    """
    return Trainable(parts.trained, (parts.frozen, other), partial(_join, parts.join))  # pyright: ignore[reportArgumentType]


def _join(join: Callable[[Params, Any], Gemma], trained: Params, frozen: Any) -> ModelPair:
    inner, other = frozen
    return ModelPair(join(trained, inner), other)


def two_models(
    model: Gemma | ModelPair, make: Callable[[Gemma], Gemma] | None, given: bool, name: str
) -> tuple[Gemma, Gemma | None]:
    """The model that is trained, and the one to compare with, without gradients.

    Args:
      make: Makes the second from the first.
      given: Whether the batch holds what the second would say; it is `None` then.
      name: Of the second, for errors.

    Raises:
      ValueError: There is not exactly one of: a pair, `make`, what is given.
    """
    pair = isinstance(model, ModelPair)
    sources = {f"the {name} of a ModelPair": pair, f"`{name}=`": make is not None}
    sources[f"what the {name} said, in the batch"] = given
    if sum(sources.values()) != 1:
        found = " and ".join(source for source, there in sources.items() if there) or "none"
        raise ValueError(f"expected one {name}, got {found}; give one of {', '.join(sources)}")
    mine = model.model if isinstance(model, ModelPair) else model
    if given:
        return mine, None
    other = model.other if isinstance(model, ModelPair) else make(mine)  # pyright: ignore[reportOptionalCall]
    return mine, jax.lax.stop_gradient(other)
