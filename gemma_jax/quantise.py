"""Makes models whose weights are stored narrower than the arithmetic (`weights/stored.py`).

`store_weights` is the transform that `load` applies to each parameter as it arrives; `quantise`
applies it to a whole model. The model does not know: a Param holds a `StoredWeight` in place of an
array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.decoder.model import Gemma
from gemma_jax.storages import WEIGHT_STORAGES, WeightStorage, one_of
from gemma_jax.weights.int8 import to_int8
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.stored import StoredWeight
from gemma_jax.weights.tree import map_params


def store_weights(storage: WeightStorage) -> Callable[[nnx.Param, jax.Array], Weight]:
    """A function `(param, array) -> array or StoredWeight` for one loaded parameter.

    Vectors (norm scales) keep their dtype. int8 is symmetric, one scale per output channel.
    """
    if storage not in WEIGHT_STORAGES:
        raise ValueError(f"{storage=} must be {one_of(WEIGHT_STORAGES)}")
    to_storage = _TO_STORAGE[storage]

    def store(param: nnx.Param, array: jax.Array) -> Weight:
        inputs = param.get_metadata().get("inputs", "")
        return to_storage(array, _last_axes(array, inputs)) if inputs else array

    return store


def quantise(model: Gemma, storage: WeightStorage) -> Gemma:
    """The model with its matrices stored as `storage`; arithmetic stays what it was."""
    store = store_weights(storage)
    return map_params(model, lambda param: store(param, param.get_value()))


def _last_axes(array: jax.Array, letters: str) -> tuple[int, ...]:
    return tuple(range(array.ndim - len(letters), array.ndim))


@jax.jit
def _as_bits(array: jax.Array) -> StoredWeight:
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16)
    return StoredWeight(bits, None)


def _as_int8(array: jax.Array, axes: tuple[int, ...]) -> StoredWeight:
    return StoredWeight(*to_int8(array, axes))


_TO_STORAGE: dict[WeightStorage, Callable[[jax.Array, tuple[int, ...]], Weight]] = {
    "float32": lambda array, axes: array,
    "bfloat16": lambda array, axes: _as_bits(array),
    "int8": jax.jit(_as_int8, static_argnums=1),
}
