"""One entry for every implementation.

Local letters: R rows of activations; I inputs; O outputs.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import jax

from gemma_kernels.implementations import first_that_can
from gemma_kernels.platform import require, require_hopper
from gemma_kernels.quantized_matmul.cpu import quantized_matmul_cpu
from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.reference import quantized_matmul_reference
from gemma_kernels.quantized_matmul.xla import gradient_of_x, quantized_matmul_xla

Activations = Literal["float", "int8"]


def _of_layer(implementation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`implementation`, given the layer of a stack that is meant."""

    def quantized_matmul(x_RI, w, *, layer=None, **options):
        return implementation(x_RI, w if layer is None else w.layer(layer), **options)

    return quantized_matmul


def _tpu(x_RI: jax.Array, w: QuantizedMatrix, **options) -> jax.Array:
    require("tpu")
    # Pallas takes a while to import.
    from gemma_kernels.quantized_matmul.tpu import quantized_matmul_tpu

    return quantized_matmul_tpu(x_RI, w, **options)


def _hopper(x_RI: jax.Array, w: QuantizedMatrix, **options) -> jax.Array:
    require_hopper()
    from gemma_kernels.quantized_matmul.hopper import quantized_matmul_hopper

    return quantized_matmul_hopper(x_RI, w, **options)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "tpu": _tpu,
    "hopper": _hopper,
    "cpu": quantized_matmul_cpu,
    "xla": _of_layer(quantized_matmul_xla),
    "reference": _of_layer(quantized_matmul_reference),
}
# Tried in this order. "hopper" is not among them as long as it has not run on a Hopper GPU.
AUTOMATIC = ("tpu", "cpu", "xla")


def quantized_matmul(
    x_RI: jax.Array,
    w: QuantizedMatrix,
    *,
    activations: Activations = "float",
    layer: jax.Array | None = None,
    frozen: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies activations with a quantised matrix: `x @ w.T`.

    Args:
      x_RI: float32 or bfloat16 `[R, I]`.
      w: `[O, I]`, in any layout.
      activations: `"float"`: as they are. `"int8"`: rounded to int8 with a scale per 32 of a row,
        so that products are those of whole numbers; the only rounding besides that of float32.
      layer: int32. `w` is a stack of matrices `[L, O, I]`, of which this one is read where it lies.
      frozen: The matrix is a constant: gradients reach `x` alone, by way of the widened matrix and
        as if nothing had been rounded. Kernels refuse gradients otherwise.
      implementation: `None` or `"auto"` takes the first that can serve this call; a name from
        `IMPLEMENTATIONS` takes that one or fails.

    Returns:
      `[R, O]` in the dtype of `x`, summed in float32.

    Raises:
      ValueError: Operands do not fit together, or the name is unknown.
      NotImplementedError: The named implementation, or every one, cannot serve this call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from gemma_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul
      >>> w = QuantizedMatrix(jnp.full((8, 64), 3, jnp.int8), jnp.full((8, 2), 0.5, jnp.float16))
      >>> float(quantized_matmul(jnp.ones((1, 64)), w)[0, 0])
      96.0
    """
    stacked = layer is not None
    if x_RI.ndim != 2 or len(w.shape) != 2 + stacked or x_RI.shape[1] != w.shape[-1]:
        expected = "[R, I] and [L, O, I]" if stacked else "[R, I] and [O, I]"
        raise ValueError(f"x has shape {x_RI.shape} and w {w.shape}; expected {expected}")
    if activations not in ("float", "int8"):
        raise ValueError(f"unknown {activations=}; choose float or int8")
    if frozen:
        return _with_gradient_of_x(implementation, activations)(x_RI, w, layer)
    return _product(implementation, activations, x_RI, w, layer)


def _product(
    implementation: str | None,
    activations: Activations,
    x_RI: jax.Array,
    w: QuantizedMatrix,
    layer: jax.Array | None,
) -> jax.Array:
    return first_that_can(
        "quantized matmul", IMPLEMENTATIONS, AUTOMATIC, implementation,
        x_RI, w, activations=activations, layer=layer,
    )  # fmt: skip


@cache
def _with_gradient_of_x(implementation: str | None, activations: Activations):
    """The product with a matrix that is a constant. Backward keeps it as it is, in codes."""

    @jax.custom_vjp
    def product(x_RI, w, layer):
        return _product(implementation, activations, x_RI, w, layer)

    def forward(x_RI, w, layer):
        return product(x_RI, w, layer), (w, layer)

    def backward(kept, dy_RO):
        w, layer = kept
        return gradient_of_x(dy_RO, w if layer is None else w.layer(layer)), None, None

    product.defvjp(forward, backward)
    return product
