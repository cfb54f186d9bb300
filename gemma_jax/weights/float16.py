"""Products in float16 inside of a model in float32, for chips whose bfloat16 is slow (T4).

Gemma 3's residual stream reaches 8e5, and float16 ends at 65,504: plain float16 gives NaN
(unslothai/unsloth#2044 is the symptom, unsloth-zoo's `temporary_patches/gemma.py` a cure). So the
stream, norms, rotations, attention's scores and the gated product stay float32, and only the
seven matrices of a layer multiply float16: what enters is clamped to its range, sums are float32.
Gradients are brought to the middle of its range by a power of two, each tensor by its own, so that
small ones are not lost; a scale of the loss would be one number for all.
"""

from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import Index, StandIn, Weight, take
from gemma_jax.weights.tree import dims_of, flat_params, with_params

LARGEST = float(jnp.finfo(jnp.float16).max)
TOP = 15  # gradients are scaled to lie below 2**15
Model = TypeVar("Model", bound=nnx.Module)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float16Product(StandIn):
    """Stands for an array of any floating dtype that is multiplied in float16.

    Attributes:
      array: With output letters first.
    """

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        return self.array.shape

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """See `StandIn`; gradients are float32."""
        return _product(equation, x.astype(jnp.float32), self.array).astype(x.dtype)

    def rows(self, ids: jax.Array) -> jax.Array:
        """See `StandIn`."""
        return lookup(self.array, ids)

    def take(self, axis: int, index: Index) -> "Float16Product":
        """See `StandIn`."""
        return Float16Product(take(self.array, axis, index))

    def dense(self) -> jax.Array:
        """See `StandIn`."""
        return self.array

    def array_dims(self, dims: str) -> "Float16Product":
        """See `StandIn`."""
        return Float16Product(dims)  # pyright: ignore[reportArgumentType]


def with_float16_products(model: Model) -> Model:
    """Makes a model whose layers multiply in float16: those matrices that know F, N or K.

    Adapters keep float32 beside a base in float16. Weights that are stored as whole numbers have
    products of their own, and keep them.
    """
    params = {p: v for p, v in flat_params(model).items() if p[0] == "blocks"}
    chosen = {
        path: _narrow(param.get_value())
        for path, param in params.items()
        if param.get_metadata().get("inputs") and set("FNK") & set(dims_of(param))
    }
    return with_params(model, chosen)


def _narrow(weight: Weight) -> Any:
    if not isinstance(weight, StandIn):
        return Float16Product(weight)
    if is_dataclass(weight) and (base := getattr(weight, "base", None)) is not None:
        return replace(weight, base=_narrow(base))
    return weight


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return _forward(equation, x, w)[0]


def _forward(equation: str, x: jax.Array, w: jax.Array):
    x16 = jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float16)
    return _sum(equation, x16, w.astype(jnp.float16)), (x16, w)


def _backward(equation: str, kept, dy: jax.Array):
    x16, w = kept
    letters_x, letters_w, letters_y = equation.replace("->", ",").split(",")
    _, exponent = jnp.frexp(jnp.max(jnp.abs(dy)))
    shift = jnp.clip(TOP - exponent, -100, 100)
    dy16 = jnp.ldexp(dy, shift).astype(jnp.float16)
    dx = _sum(f"{letters_y},{letters_w}->{letters_x}", dy16, w.astype(jnp.float16))
    dw = _sum(f"{letters_y},{letters_x}->{letters_w}", dy16, x16)
    dx = jnp.where(jnp.abs(x16) < LARGEST, jnp.ldexp(dx, -shift), 0)
    return dx, jnp.ldexp(dw, -shift).astype(w.dtype)


_product.defvjp(_forward, _backward)


def _sum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
