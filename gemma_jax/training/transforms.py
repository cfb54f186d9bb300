"""What optax leaves open: float32 around narrow parameters, layers that lie"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_jax.training.param_letters import Letters, LettersOf
from gemma_jax.training.trainable import Params


def norm_in_float32(tree: Any) -> jax.Array:
    """The l2 norm of all arrays together; a sum of squares in bfloat16 would be too low."""
    return optax.tree.norm(in_float32(tree))


def in_float32(tree: Any) -> Any:
    """Every array of a tree in float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """Scales gradients by `min(1, most / (norm + 1e-6))`, of the norm of all that is trained.

    This is `torch.nn.utils.clip_grad_norm_`; `optax.clip_by_global_norm` lacks the 1e-6.
    """

    def update(gradients, state, params=None):
        share = jnp.minimum(1.0, most / (norm_in_float32(gradients) + 1e-6))
        return jax.tree.map(lambda g: g * share, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class WideState(NamedTuple):
    """Attributes: `inner`: of the optimizer. `masters`: path -> float32 copy of a narrow array."""

    inner: optax.OptState
    masters: dict


def computed_in_float32(
    inner: optax.GradientTransformation, *, masters: bool
) -> optax.GradientTransformation:
    """Lets an optimizer see float32 alone, so that its moments are that whatever is trained.

    optax keeps Adam's second moment in the dtype of the parameters, and in bfloat16 it never
    decays: 0.999 of a number is rounded to the number.

    Args:
      masters: Keep a float32 copy of each narrower parameter, which the updates add to, and of
        which the parameter is the rounding: 4 bytes per parameter. Without, an update below half a
        unit in the last place is lost: in bfloat16 that is 0.2 to 0.4 % of the parameter.
    """

    def init(params: Params) -> WideState:
        narrow = {p: a for p, a in params.items() if masters and a.dtype != jnp.float32}
        return WideState(inner.init(in_float32(params)), in_float32(narrow))

    def update(gradients, state, params=None):
        wide = in_float32(params) | state.masters
        updates, moments = inner.update(in_float32(gradients), state.inner, wide)
        new = {path: wide[path] + updates[path] for path in state.masters}
        # The parameter and its update add up to the new master: their difference is exact.
        steps = {path: new[path] - params[path].astype(jnp.float32) for path in new}
        return updates | steps, WideState(moments, new)

    return optax.GradientTransformation(init, update)


def per_matrix(
    inner: optax.GradientTransformation, letters: LettersOf
) -> optax.GradientTransformation:
    """Applies a transformation to each matrix or vector by itself: `[outputs, inputs]` or `[n]`.

    For those that look at a whole tensor (its norm, its two largest axes): in a stack of layers
    they would look at all layers at once. The state is path -> that of the stack.
    """

    def flat(path, array: jax.Array) -> jax.Array:
        return _as_matrices(array, letters(path, array.ndim))

    def init(params: Params):
        shown = {path: p for path, p in params.items() if not isinstance(p, optax.MaskedNode)}
        return {path: jax.vmap(inner.init)(flat(path, p)) for path, p in shown.items()}

    def update(gradients: Params, state, params: Params | None = None):
        updates, states = dict(gradients), {}
        for path in state:
            gradient = gradients[path]
            given = [flat(path, a[path]) for a in (gradients, params) if a is not None]
            out, states[path] = jax.vmap(inner.update)(given[0], state[path], *given[1:])
            updates[path] = out.reshape(gradient.shape)
        return updates, states

    return optax.GradientTransformation(init, update)


def _as_matrices(array: jax.Array, letters: Letters) -> jax.Array:
    """`[stacked, outputs, inputs]`, or `[stacked, n]` of vectors."""
    first, columns = letters.stacked(array.ndim), letters.columns(array.ndim)
    stacked = math.prod(array.shape[:first])
    own = (-1,) if letters.is_vector else (-1, math.prod(array.shape[columns:]))
    return array.reshape(stacked, *own)
