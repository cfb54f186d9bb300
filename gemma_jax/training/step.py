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
from gemma_jax.training.accumulate import Metrics, accumulated
from gemma_jax.training.state import TrainState
from gemma_jax.training.trainable import Params
from gemma_jax.training.transforms import norm_in_float32

OWN_METRICS = {"loss", "grad_norm", "update_norm", "finite"}
Objective = Callable[[Gemma, Any, jax.Array], tuple[jax.Array, Metrics]]  # of model, batch, key
Init = Callable[..., TrainState]
Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]  # of state, frozen, batch


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    join: Callable[[Params, Any], Gemma],
    *,
    micro_batches: int = 1,
    skip_nonfinite: bool = True,
) -> tuple[Init, Step]:
    """Makes the functions that begin a run of training and take a step of it.

    Args:
      objective: `(model, batch, key) -> (loss, metrics)`: a float32 scalar to be lowered, and
        numbers by name that say more of it. `training.objectives` has some; a batch is whatever
        the objective reads.
      join: The way back to a model; see `trainable`.
      micro_batches: More than one: a batch's arrays have an axis of so many in front, and a step
        goes through them one after another, in the memory of one. Each counts as much as its
        metric `tokens` says (else `pairs`, else all alike), so that the step is that of all rows
        together; its gradients are float32. `stack_micro_batches` makes such a batch.
      skip_nonfinite: A step whose loss or gradients are not finite returns the state that it was
        given.

    Returns:
      `init(trained, key, data_position=None) -> state`, with copies of its arrays, so that a state
      may be donated; and `step(state, frozen, batch) -> (state, metrics)`, not compiled: a caller
      adds shardings as it needs them. Its metrics are those of the objective and, all scalars:
      `loss`; `grad_norm`, the norm of the gradients of all that is trained, before the optimizer;
      `update_norm`, that of what the optimizer adds, both summed in float32; and `finite`, whether
      loss and gradients are. An objective with metrics by these names is refused.

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

        def loss(trained: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
            return objective(join(trained, frozen), batch, key)

        gradient = jax.value_and_grad(loss, has_aux=True)
        if micro_batches == 1:
            (value, metrics), gradients = gradient(state.trained, batch, key)
        else:
            _check_stacked(batch, micro_batches)
            (value, metrics), gradients = accumulated(gradient, state.trained, batch, key)
        if taken := sorted(metrics.keys() & OWN_METRICS):
            raise ValueError(f"the objective's metrics {taken} are the step's own; rename them")
        norm = norm_in_float32(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def move(state: TrainState, gradients: Params) -> tuple[TrainState, jax.Array]:
            updates, moments = optimizer.update(gradients, state.moments, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            after = replace(state, step=state.step + 1, trained=trained, moments=moments)
            return after, norm_in_float32(updates)

        def stay(state: TrainState, gradients: Params) -> tuple[TrainState, jax.Array]:
            return state, jnp.zeros((), jnp.float32)

        if skip_nonfinite:  # a branch: to choose array by array would take old and new ones at once
            state, update_norm = jax.lax.cond(finite, move, stay, state, gradients)
        else:
            state, update_norm = move(state, gradients)
        norms = {"grad_norm": norm, "update_norm": update_norm}
        return state, metrics | norms | {"loss": value, "finite": finite}

    return init, step


def _check_stacked(batch: Any, micro_batches: int) -> None:
    """Every array of a batch has the axis that is gone through."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.shape(leaf)[:1] != (micro_batches,):
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "the batch"
            raise ValueError(
                f"{name} has shape {list(jnp.shape(leaf))}, expected [{micro_batches}, ...]: with "
                f"{micro_batches=} every array of a batch has an axis of these in front; see "
                "stack_micro_batches"
            )
