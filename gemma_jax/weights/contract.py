"""The product of activations with a weight, whatever stands in its place.

Local letters: O outputs; I inputs of one product; T rows of activations.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_jax.compat import fuses_matrix_vector
from gemma_jax.dims import weight_dims
from gemma_jax.weights.protocol import StandIn, Weight

HIGHEST = jax.lax.Precision.HIGHEST
FUSED = 2048  # elements of a vector that XLA's CPU backend fuses into its product with a matrix
FEW_ROWS, LARGE = 64, 2**18  # rows and elements of a matrix for which `few_rows` is the faster way


def contract(equation: str, x: jax.Array, w: Weight) -> jax.Array:
    """`einsum(equation, x, w)` in the dtype of `x`, with full float32 products in float32.

    An array has the letters of the result in front. One row of activations, as in decoding, is a
    vector.
    """
    if isinstance(w, StandIn):
        return w.contract(equation, x)
    w = w.astype(x.dtype)
    outputs = w.ndim - len(contracted(equation))
    if x.size == math.prod(w.shape[outputs:]) and fuses_matrix_vector():
        y_O = matrix_vector(w.reshape(-1, x.size), x.ravel())
        return y_O.reshape((1,) * (len(equation.split("->")[1]) - outputs) + w.shape[:outputs])
    if _suits_few_rows(equation, x, w, outputs) and fuses_matrix_vector():
        inputs = math.prod(w.shape[outputs:])
        y_TO = few_rows(w.reshape(-1, inputs), x.reshape(-1, inputs))
        return y_TO.reshape(x.shape[: x.ndim - (w.ndim - outputs)] + w.shape[:outputs])
    return jnp.einsum(equation, x, w, precision=HIGHEST)


def _suits_few_rows(equation: str, x: jax.Array, w: jax.Array, outputs: int) -> bool:
    """Whether a product is one of few rows with a large matrix, in float32."""
    given, _, result = equation.partition("->")
    letters, of_weight = given.split(",")
    inputs, rows = contracted(equation), x.size // math.prod(w.shape[outputs:])
    in_order = letters.endswith(inputs) and result == (
        letters.removesuffix(inputs) + of_weight.removesuffix(inputs)
    )
    return in_order and rows <= FEW_ROWS and w.size >= LARGE and x.dtype == jnp.float32


def few_rows(w_OI: jax.Array, x_TI: jax.Array) -> jax.Array:
    """`x_TI @ w_OI.T`, for XLA's CPU backend (see `fuses_matrix_vector`).

    It copies the second factor of a matrix product into another order first. If that is the matrix
    of weights, it takes longer than all the rest: up to three times, of four rows.
    """
    y_OT = jnp.dot(w_OI, x_TI.T, precision=HIGHEST)
    # Else the transpose of a product becomes the product in the other order.
    return jax.lax.optimization_barrier(y_OT).T


def matrix_vector(
    w_OI: jax.Array, x_I: jax.Array, widen: Callable[[jax.Array], jax.Array] = lambda w: w
) -> jax.Array:
    """`widen(w_OI) @ x_I`, for XLA's CPU backend (see `fuses_matrix_vector`).

    It makes one loop of the product and of whatever the matrix is computed from: a conversion, or
    a cut out of a larger matrix. Nothing is written in between, as long as the vector is below 16
    KiB; so longer ones are taken in pieces, here 8 KiB.
    """
    cuts = [slice(i, i + FUSED) for i in range(0, x_I.size, FUSED)]
    parts = [jnp.dot(x_I[cut], widen(w_OI[:, cut]).T, precision=HIGHEST) for cut in cuts]
    if len(parts) == 1:
        return parts[0]
    # Not a sum: XLA would rather fuse that into a product than the product's own matrix.
    return jnp.dot(jnp.ones(len(parts), x_I.dtype), jnp.stack(parts), precision=HIGHEST)


def contracted(equation: str) -> str:
    """Letters of the weight that the result does not have.

    >>> contracted("BTNH,DNH->BTD")
    'NH'
    """
    result = equation.partition("->")[2]
    return "".join(letter for letter in weight_dims(equation) if letter not in result)
