"""The step of training, whatever the objective, the optimizer and the trained part are.

    trained, frozen, join = trainable(model)
    init, step = make_step(next_token, optax.adamw(1e-4), join)
    step = jax.jit(step, donate_argnums=0)
    state = init(trained, jax.random.key(0))
    for batch in data:
        state, metrics = step(state, frozen, batch)
    model = join(state.trained, frozen)

Whoever compiles it chooses shardings and what to donate; the planner compiles this same step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_jax.decoder.model import Gemma
from gemma_jax.training.state import TrainState
from gemma_jax.training.trainable import Params

Metrics = dict[str, jax.Array]
Objective = Callable[[Gemma, Any, jax.Array], tuple[jax.Array, Metrics]]  # of model, batch, key
Init = Callable[..., TrainState]
Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]  # of state, frozen, batch


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    join: Callable[[Params, Any], Gemma],
) -> tuple[Init, Step]:
    """Makes the functions that begin a run of training and take a step of it.

    Args:
      objective: `(model, batch, key) -> (loss, metrics)`: a float32 scalar to be lowered, and
        numbers by name that say more of it. `training.objectives` has some; a batch is whatever
        the objective reads.
      join: The way back to a model; see `trainable`.

    Returns:
      `init(trained, key, data_position=None) -> state`, with copies of its arrays, so that a state
      may be donated; and `step(state, frozen, batch) -> (state, metrics)`, not compiled: a caller
      adds shardings as it needs them. Its metrics are those of the objective, `loss`, and
      `grad_norm`, the norm of the gradients of all that is trained, before the optimizer; an
      objective with metrics by these two names is refused.

    Examples:
      >>> import gemma_jax as gj
      >>> import jax
      >>> import numpy as np
      >>> import optax
      >>> model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> trained, frozen, join = gj.trainable(model, lambda path, param: "attn" in path)
      >>> init, step = gj.make_step(gj.next_token, optax.sgd(0.1), join)
      >>> state, step = init(trained, jax.random.key(0)), jax.jit(step, donate_argnums=0)
      >>> for _ in range(3):
      ...     state, metrics = step(state, frozen, tokens)
      ...     print(f"{metrics['loss']:.2f}")
      6.74
      5.44
      4.27
      >>> model = join(state.trained, frozen)
    """

    def init(trained: Params, key: jax.Array, data_position: Any = None) -> TrainState:
        trained, key, data_position = jax.tree.map(jnp.copy, (trained, key, data_position))
        moments = optimizer.init(trained)
        return TrainState(jnp.zeros((), jnp.int32), trained, moments, key, data_position)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def loss(trained: Params) -> tuple[jax.Array, Metrics]:
            return objective(join(trained, frozen), batch, key)

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.trained)
        if taken := sorted(metrics.keys() & {"loss", "grad_norm"}):
            raise ValueError(f"the objective's metrics {taken} are the step's own; rename them")
        updates, moments = optimizer.update(gradients, state.moments, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        state = replace(state, step=state.step + 1, trained=trained, moments=moments)
        return state, metrics | {"loss": value, "grad_norm": optax.tree.norm(gradients)}

    return init, step
