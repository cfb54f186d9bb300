"""Training for low bits: models that compute with rounded weights and learn through the rounding.

    objective = quantisation_aware(next_token, "int4:32")  # an objective like any other
    init, step = make_step(objective, optimizer, join)     # the trained weights stay floats
    model = fake_quantise(join(state.trained, frozen), "int4:32")

Rounding is done anew in every pass; its gradient is taken to be one (the straight-through estimator
of Bengio et al., 2013), so small steps add up until a code flips. What comes out is the model whose
codes a file will hold: in blocks of a file, rounding it once more changes nothing.

Local letters: O outputs; I inputs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.decoder.model import Gemma
from gemma_jax.quantisation import storages_of
from gemma_jax.storages import MADE_STORAGES, is_quantised, one_of, storage_bits, storage_group
from gemma_jax.training.model_pair import ModelPair
from gemma_jax.training.step import Metrics, Objective
from gemma_jax.weights.protocol import StandIn
from gemma_jax.weights.rounding import round_to_groups
from gemma_jax.weights.tree import flat_params, with_params
from gemma_kernels.quantized_matmul import QuantizedMatrix

BLOCK = 32  # inputs with one scale in a GGUF file


def fake_quantise(model: Gemma, storage: str | Mapping[str, str]) -> Gemma:
    """Makes a model whose matrices are rounded as a storage would round them, in floats.

    Gradients pass through to the weights as if nothing had been rounded.

    Args:
      storage: As in `quantise`: one name for all matrices, or patterns of names with the storage of
        each. Besides those of `quantise` there are `"q4_0"` and `"q8_0"`, the blocks of GGUF files,
        and `"float16"`.

    Raises:
      ValueError: As `quantise` does.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",))
      >>> rounded = gj.fake_quantise(model, {"*.ffn.*": "q4_0"})
      >>> again = gj.fake_quantise(rounded, {"*.ffn.*": "q4_0"})
      >>> w = "blocks", 0, 0, "ffn", "up", "w"
      >>> one, two = (gj.trainable(m).trained[w] for m in (rounded, again))
      >>> bool((one == two).all())
      True
    """
    for name in storage.values() if isinstance(storage, Mapping) else (storage,):
        if name not in FORMS:
            raise ValueError(f"storage={name!r} must be {one_of(tuple(FORMS))}")
    params, rounded = flat_params(model), {}
    for path, kind in storages_of(model, storage).items():
        value, num_inputs = params[path].get_value(), len(params[path].get_metadata()["inputs"])
        if isinstance(value, StandIn):
            name = ".".join(map(str, path))
            raise ValueError(f"{name} is stored narrower already: load the model in floats")
        rounded[path] = _straight_through(kind, num_inputs, value)
    return with_params(model, rounded)


def quantisation_aware(objective: Objective, storage: str | Mapping[str, str]) -> Objective:
    """Makes an objective of the model as `fake_quantise` rounds it.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> loss, _ = gj.quantisation_aware(gj.next_token, {"*.ffn.*": "q4_0"})(model, tokens)
      >>> print(f"{loss:.2f}")
      6.65
    """

    def of_rounded(
        model: Gemma | ModelPair, batch: Any, key: Any = None
    ) -> tuple[jax.Array, Metrics]:
        rounded = partial(fake_quantise, storage=storage)  # a reference stays as it is
        model = model.map(rounded) if isinstance(model, ModelPair) else rounded(model)
        return objective(model, batch, key)  # pyright: ignore[reportArgumentType]

    return of_rounded


def _whole_numbers(bits: int, group: int | None, w_OI: jax.Array) -> jax.Array:
    codes, scale = round_to_groups(w_OI, bits, group or w_OI.shape[-1])
    return QuantizedMatrix(codes, scale).dense()


def _q4_0(w_OI: jax.Array) -> jax.Array:
    """As `quantize_row_q4_0_ref` of ggml: the entry farthest from 0 becomes -8 exactly."""
    groups = w_OI.reshape(*w_OI.shape[:-1], -1, BLOCK)
    farthest = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    scale = jnp.take_along_axis(groups, farthest, axis=-1) / -8
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    # Behind the barrier products and sums are rounded one by one, as they are in ggml.
    scaled = jax.lax.optimization_barrier(groups * inverse)
    codes = jnp.clip(jnp.trunc(scaled + 8.5), 0, 15) - 8
    return (codes * _half(scale)).reshape(w_OI.shape)


def _q8_0(w_OI: jax.Array) -> jax.Array:
    """As `quantize_row_q8_0_ref` of ggml; halves are rounded away from 0."""
    groups = w_OI.reshape(*w_OI.shape[:-1], -1, BLOCK)
    scale = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / 127
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    scaled = jax.lax.optimization_barrier(groups * inverse)
    whole = jnp.trunc(scaled)
    codes = whole + jnp.trunc(2 * (scaled - whole))
    return (codes * _half(scale)).reshape(w_OI.shape)


def _half(scale: jax.Array) -> jax.Array:
    return scale.astype(jnp.float16).astype(jnp.float32)


Round = Callable[[jax.Array], jax.Array]
FORMS: Mapping[str, Round] = {
    "float32": lambda w_OI: w_OI,
    "float16": lambda w_OI: w_OI.astype(jnp.float16),
    "bfloat16": lambda w_OI: w_OI.astype(jnp.bfloat16),
    **{
        name: partial(_whole_numbers, storage_bits(name), storage_group(name))
        for name in MADE_STORAGES
        if is_quantised(name)
    },
    "q4_0": _q4_0,
    "q8_0": _q8_0,
}


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@partial(jax.jit, static_argnums=(0, 1))
def _straight_through(form: str, num_inputs: int, array: jax.Array) -> jax.Array:
    """The array, rounded as a matrix whose columns are its last `num_inputs` axes."""
    outputs = array.shape[: array.ndim - num_inputs]
    w_OI = array.astype(jnp.float32).reshape(*outputs, -1)
    return FORMS[form](w_OI).reshape(array.shape).astype(array.dtype)


@_straight_through.defjvp
def _(form, num_inputs, primals, tangents):
    return _straight_through(form, num_inputs, *primals), tangents[0]
